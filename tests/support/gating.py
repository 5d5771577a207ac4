"""Networks with gates, and what slim models made of them are compared with."""

import torch
from torch import nn

import polarfast as pf
from support.nets import Bottlenecks, Branches, Grouped, Residual, SqueezeExcite, X, chain, settle

NETS = [chain, Residual, Branches, Grouped, Bottlenecks, SqueezeExcite]


def bare(act=nn.ReLU, kernel: int = 3) -> nn.Module:
    """A VGG without normalization: padded convolutions with biases, a hidden linear layer."""
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel, padding=pad), act(), nn.Conv2d(8, 12, kernel, padding=pad), act(),
        nn.MaxPool2d(2), nn.Conv2d(12, 10, kernel, padding=pad, bias=False), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 9), act(), nn.Linear(9, 5),
    )  # fmt: skip


def make(build, residual="keep", where=None, seed=0, share=0.5):
    """A settled network with gates away from 1, a share of each layer's at 0."""
    torch.manual_seed(seed)
    model = settle(build(), torch.randn(4, 3, 10, 10), seed=seed)
    scales = pf.add_gates(model, X, where, residual)
    with torch.no_grad():
        for gate in scales.values():
            gate.uniform_(0.3, 1.0)
            gate[torch.randperm(gate.numel())[: int(share * gate.numel())]] = 0
    return model, scales


def is_plain(slim: nn.Module, original: nn.Module) -> bool:
    """Whether a slim model has no gate and, but for put-back norms, the constructor's classes."""
    same = all(
        isinstance(new, type(old))
        for new, old in zip(slim.modules(), original.modules(), strict=True)
    )
    return (
        same
        and not any("gate" in name for name, _ in slim.named_parameters())
        and not any("Gated" in type(module).__name__ for module in slim.modules())
    )
