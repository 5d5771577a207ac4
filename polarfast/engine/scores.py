"""What rivals compare in place of |γ|: one number a channel, for ``pf.plan(scores=...)``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polarfast as pf

from .data.plan import EpochPlan
from .data.source import DataSource


def relative(scales: pf.ScalingFactors) -> dict[str, Tensor]:
    """|γ| in units of its layer's mean."""
    sizes = {name: gamma.detach().abs().float() for name, gamma in scales.items()}
    return {name: each / each.mean().clamp(min=1e-12) for name, each in sizes.items()}


def in_order(scales: pf.ScalingFactors) -> dict[str, Tensor]:
    """Each layer's channels from first to last: all layers lose the same share from their end."""
    return {name: _ranks(gamma) for name, gamma in scales.items()}


def drawn(scales: pf.ScalingFactors, seed: int) -> dict[str, Tensor]:
    """Random channels, the same share of every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _ranks(gamma)[torch.randperm(gamma.numel(), generator=generator)]
        for name, gamma in scales.items()
    }


def taylor(
    model: nn.Module, scales: pf.ScalingFactors, data: DataSource, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """How much the loss would change, to first order, if a channel went: the mean over the batches
    of one epoch of (γ ∂L/∂γ + β ∂L/∂β)² (Molchanov et al. 2019, "Importance Estimation for Neural
    Network Pruning", Eq. 8, at BatchNorms). In eval mode; the model is left as found.
    """
    factors = {name: [gamma, *_bias(model, name)] for name, gamma in scales.items()}
    wanted = [tensor for pair in factors.values() for tensor in pair]
    totals = {name: torch.zeros_like(gamma, dtype=torch.float64) for name, gamma in scales.items()}
    was_training = model.training
    model.eval()
    for images, labels in data.train(EpochPlan(seed, batch_size)):
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), labels)
            found = torch.autograd.grad(loss, wanted)
        gradients = dict(zip(map(id, wanted), found, strict=True))
        for name, pair in factors.items():
            change = sum(tensor.detach() * gradients[id(tensor)] for tensor in pair)
            totals[name] += torch.as_tensor(change).double().square()
    model.train(was_training)
    return {name: total.float() for name, total in totals.items()}


def _bias(model: nn.Module, name: str) -> list[Tensor]:
    """β that belongs to a γ; gates have none."""
    owner, _, kind = name.rpartition(".")
    bias = getattr(model.get_submodule(owner), "bias", None) if kind == "weight" else None
    return [bias] if isinstance(bias, Tensor) else []


def _ranks(gamma: Tensor) -> Tensor:
    count = gamma.numel()
    return torch.arange(count, 0, -1).float() / count
