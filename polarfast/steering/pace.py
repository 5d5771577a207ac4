"""How fast an optimizer moves scaling factors: its learning rates, and the λ for a speed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..scaling.factors import ScalingFactors
from ..sharding import Part, local


def groups_of(scales: Mapping[str, Tensor], optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups that hold these factors."""
    ids = {id(gamma) for gamma in scales.values()}
    return [g for g in optimizer.param_groups if not ids.isdisjoint(map(id, g["params"]))]


def rate_of(scales: Mapping[str, Tensor], optimizer: Optimizer) -> tuple[float, dict[str, Any]]:
    """The largest learning rate of the factors, and the parameter group that has it."""
    group = max(groups_of(scales, optimizer), key=lambda group: float(group["lr"]))
    return float(group["lr"]), group


def scales_gradients(group: Mapping[str, Any]) -> bool:
    """Whether steps are gradients in units of their usual size, as Adam's: at most lr or so."""
    return "betas" in group or "eps" in group


def strength_for(
    speed: float, scales: ScalingFactors, optimizer: Optimizer, part: Part, scale: Tensor | None
) -> float:
    """λ with which an optimizer moves factors so fast, by its learning rate now.

    Args:
        speed: of a factor under its center, a step.
        part: of `scales`, that this process holds.
        scale: what the gradients are still multiplied with under AMP; None: nothing.
    """
    rate, group = rate_of(scales, optimizer)
    if not scales_gradients(group):  # SGD: 2λ·lr/(1 − μ) a step
        return float(speed * (1 - group.get("momentum", 0.0)) / (2 * rate))
    # Adam and the like move by lr times the gradient in units of its usual size.
    moving = {gamma: gamma.grad for gamma in scales.values() if gamma.grad is not None}
    grads = torch.cat([local(grad).reshape(-1) for grad in moving.values()])
    squares = grads.double().square() / (1.0 if scale is None else scale.double() ** 2)
    known = [optimizer.state.get(gamma, {}).get("exp_avg_sq") for gamma in moving]
    if all(isinstance(each, Tensor) for each in known):  # what they have been up to now
        usual = torch.cat([local(each).reshape(-1) for each in known]).double()
        squares = torch.maximum(squares, usual)
    return max(float(part.mean(squares)) ** 0.5, 1e-8) * min(speed / rate, 1.0) / 2
