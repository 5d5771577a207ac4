"""Networks with gates, and what slim models made of them are compared with."""

import copy

import torch
from nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    chain,
    settle,
)
from torch import nn

import polarfast as pf

X = torch.randn(3, 3, 10, 10, dtype=torch.float64)
TOLERANCE = 1e-10  # of the output's variation over inputs
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


def masked(model: nn.Module, plan: pf.PruningPlan) -> nn.Module:
    """The oracle: the network with its gates, 0 on the removed channels."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, kept in plan.kept.items():
            gone = torch.ones(model.get_parameter(name).numel(), dtype=torch.bool)
            gone[kept] = False
            model.get_parameter(name)[gone] = 0
    return model


def error(reference: nn.Module, slim: nn.Module) -> float:
    """Largest difference as a share of the output's variation over 16 inputs (which is nothing if
    a small network dies: then of its size, to 1e-13)."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(16, 3, 10, 10, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        a, b = reference(x.clone()), slim.eval()(x.clone())
    return float((a - b).abs().max() / ((a.amax(0) - a.amin(0)).max() + 1e-3 * a.abs().max()))


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
