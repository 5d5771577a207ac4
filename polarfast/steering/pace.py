"""How fast an optimizer moves scaling factors: its learning rates, and the λ for a speed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..scaling.factors import ScalingFactors
from ..sharding import Part, local, on_cpu

#: The part of the training in which a factor is to fall to 0, from when it is chosen; and the
#: largest that this may be, where an optimizer cannot move it as fast.
FALL, LONGEST_FALL = 0.08, 0.4
#: How much longer a fall may take than at the learning rate of now, which will be smaller.
SLACK = 1.5


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


def momentum_of(group: Mapping[str, Any]) -> float:
    """SGD's μ, of which 1 would never come to rest."""
    return min(float(group.get("momentum", 0.0)), 0.999)


def steps_to_fall(
    scales: Mapping[str, Tensor], optimizer: Optimizer, way: float, steps: int
) -> float:
    """In how many steps of a training a factor is to fall so far, from when it is chosen."""
    usual = FALL * steps
    rate, group = rate_of(scales, optimizer)
    if not scales_gradients(group):
        return usual + momentum_of(group) / (1 - momentum_of(group))  # until it is at full speed
    longest = LONGEST_FALL * steps
    return min(max(usual, SLACK * way / rate), longest) if rate else longest


def cannot_move(scales: Mapping[str, Tensor], optimizer: Optimizer, way: float, left: int) -> bool:
    """Whether an optimizer that moves factors by at most its learning rate a step cannot move them
    so far in the steps that are left, even at the largest rate of its schedule.
    """
    rate, group = rate_of(scales, optimizer)
    largest = max(rate, *(float(group.get(name, 0.0)) for name in ("initial_lr", "max_lr")))
    return scales_gradients(group) and largest * left < way


def coasting(scales: ScalingFactors, optimizer: Optimizer) -> dict[str, Tensor]:
    """How far momentum alone still carries factors towards 0 at the learning rate of now: name ->
    float32 [C] on the CPU, of the layers that have momentum.

    SGD's update is lr·b, b ← μ·b + gradient; without gradients it adds up to lr·b·μ/(1 − μ) (with
    Nesterov's form, μ times that). Where a factor will come to rest therefore moves by lr/(1 − μ)
    times the gradient in every step, without the delay with which the factor itself does. (Adam,
    which carries by some 9 lr at most, is not reckoned with.)
    """
    reach: dict[int, float] = {}
    for group in groups_of(scales, optimizer):
        momentum = momentum_of(group)
        part = momentum / (1 - momentum) * (momentum if group.get("nesterov") else 1.0)
        rate = 1.0 if group.get("lr_in_momentum") else float(group["lr"])  # timm's RMSpropTF
        reach |= dict.fromkeys(map(id, group["params"]), rate * part)
    buffers = {
        name: gamma.detach().sign() * buffer.detach() * reach[id(gamma)]
        for name, gamma in scales.items()
        if gamma.requires_grad  # the buffer of one that was frozen moves nothing
        and isinstance(buffer := optimizer.state.get(gamma, {}).get("momentum_buffer"), Tensor)
    }
    return on_cpu(buffers)


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
        return speed * (1 - momentum_of(group)) / (2 * rate)
    # Adam and the like move by lr times the gradient in units of its usual size.
    moving = {gamma: gamma.grad for gamma in scales.values() if gamma.grad is not None}
    grads = torch.cat([local(grad).reshape(-1) for grad in moving.values()])
    squares = grads.double().square() / (1.0 if scale is None else scale.double() ** 2)
    known = [optimizer.state.get(gamma, {}).get("exp_avg_sq") for gamma in moving]
    if all(isinstance(each, Tensor) for each in known):  # what they have been up to now
        usual = torch.cat([local(each).reshape(-1) for each in known]).double()
        squares = torch.maximum(squares, usual)
    return max(float(part.mean(squares)) ** 0.5, 1e-8) * min(speed / rate, 1.0) / 2
