"""`shrink`: the network becomes its slim form while it trains."""

import torch
from torch import nn

from ..errors import ArgumentError
from ..inputs import unwrap
from ..layers import gated_modules
from ..planning.pruning_plan import PruningPlan
from .slim import slim


def shrink(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: PruningPlan, verify: bool = True
) -> nn.Module:
    """Build the slim model of a plan in the middle of a training, which then goes on with it: less
    work in every step that is left. Nothing that the network computes changes, so only channels
    whose γ are at 0 may go: ``pf.plan(model, x, scales, "fixed", value=0.0)``.

    The optimizer's groups and state are cut along, in place; a `GradScaler` and learning-rate
    schedulers go on as they are. What else refers to the old parameters is made anew from the slim
    model: scaling factors (`FlopsTarget.follow` returns them), data-parallel and compiled wrappers,
    averages of weights. Detach before (`handle.remove()`), attach after.

    Args:
        model: the network that trains, in train mode or not.
        optimizer: of its parameters.
        plan: which channels stay.
        verify: as in `slim`.

    Returns:
        A new module of the same class, in the same mode; `model` is untouched.

    Raises:
        ArgumentError: a channel that would go has a γ other than 0, or leaves a constant behind
            that cannot be folded exactly; or the network has gates, which a slim model has no more.
        PlanError, VerificationError: as in `slim`.
    """
    model = unwrap(model)
    gates = [name for name, _ in gated_modules(model)]
    if gates:
        raise ArgumentError(
            f"the model has gates ({gates[0]} and others), which are multiplied into their layers "
            "when it is made slim: pf.slim after the training"
        )
    if plan.inexact:
        reader, why = next(iter(plan.inexact.items()))
        raise ArgumentError(
            f"what the removed channels leave behind does not fold exactly into {reader} ({why}), "
            "and the network would compute something else: pf.slim after the training"
        )
    params = dict(model.named_parameters())
    for name, kept in plan.kept.items():
        if name not in params:
            continue  # slim says so
        gone = params[name].detach().clone()
        gone[kept.to(gone.device)] = 0
        if bool(gone.any()):
            raise ArgumentError(
                f"channels of {name} with γ up to {float(gone.abs().max()):.2g} would go, and the "
                "network would compute something else: plan with method='fixed', value=0.0, or "
                "end the training and call pf.slim"
            )
    return slim(model, plan, verify=verify, optimizer=optimizer)
