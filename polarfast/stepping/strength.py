"""`suggest_lam`: a λ that can do its work in the steps that there are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..errors import ArgumentError, ScalingFactorError
from ..sharding import whole
from .regularizers import Polarization

if TYPE_CHECKING:
    from ..scaling.factors import ScalingFactors

#: How many times the way from where γ start to 0 a penalty should be able to push them. In the
#: paper's recipes it is 4 (VGG-16, CIFAR) to 64 (MobileNetV2, ImageNet), 6 for a ResNet-56.
TIMES = 6.0


def suggest_lam(
    optimizer: Optimizer,
    scales: ScalingFactors,
    steps: int,
    *,
    t: float = 1.2,
    average: float = 0.5,
) -> float:
    """λ for `Polarization` in a training of so many steps.

    Without a gradient of the task, SGD moves a γ under the mean by λ·(t + 1)·lr/(1 − μ) a step. A λ
    that is too small cannot bring any γ to 0 before the training ends, and then nothing is pruned.
    This λ could take γ to 0 six times over, which leaves room for the task to object. It is a
    start, not a share of MACs: for that, `FlopsTarget` finds its own λ.

    Args:
        optimizer: SGD that holds the γ, at the largest learning rate of its schedule.
        scales: the scaling factors γ, as they are when training starts.
        steps: number of optimizer steps of the training, ``epochs * len(loader)``.
        t: as in `Polarization`.
        average: mean learning rate of the training, as a share of the optimizer's present one: 0.5
            for a cosine to 0, 1 for a constant one.

    Raises:
        ArgumentError: a number is out of its range; or the optimizer scales gradients by their size
            (Adam and the like), so that nothing follows from λ before training.
        ScalingFactorError: no parameter group of the optimizer holds a γ.
    """
    Polarization(0.0, t)
    if not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps={steps!r}: give a whole number of steps, at least 1")
    if not 0.0 < average < math.inf:
        raise ArgumentError(f"average={average!r}: give a share of the learning rate, above 0")
    ids = {id(gamma) for gamma in scales.values()}
    groups = [g for g in optimizer.param_groups if not ids.isdisjoint(map(id, g["params"]))]
    if not groups:
        raise ScalingFactorError(
            "no parameter group of this optimizer holds a scaling factor: build it from "
            "model.parameters(), or take scales.rebind(model)"
        )
    group = min(groups, key=lambda group: float(group["lr"]))
    if "betas" in group or "eps" in group:
        raise ArgumentError(
            f"{type(optimizer).__name__} divides gradients by their usual size, so how far a λ "
            "moves γ is not known before training: use pf.FlopsTarget, which finds out"
        )
    if not float(group["lr"]) > 0:
        raise ArgumentError(
            f"the learning rate is {float(group['lr']):g}: set the largest one of its schedule"
        )
    gammas = [gamma.detach().abs().double().mean() for gamma in whole(scales).values()]
    way = max(float(sum(gammas)) / len(gammas), 1e-3)
    pace = (t + 1.0) * average * float(group["lr"]) / (1.0 - group.get("momentum", 0.0))
    if pace <= 0.0:
        raise ArgumentError(f"t={t:g}: with t = −1 or less no γ is pushed to 0 by itself")
    return TIMES * way / (pace * steps)
