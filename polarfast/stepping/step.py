"""The training step: λ·∂R_s/∂γ around the user's own optimizer, then γ clamped to [0, upper]."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim import optimizer as optimizer_module

from ..errors import ArgumentError, StepError
from .binding import Binding
from .hooks import StepHooks

if TYPE_CHECKING:
    from torch.amp import GradScaler

    from ..scaling.factors import ScalingFactors
    from .regularizers import Regularizer


def step(
    optimizer: Optimizer,
    scales: ScalingFactors,
    reg: Regularizer,
    scaler: GradScaler | None = None,
    closure: Callable[[], Any] | None = None,
) -> Any:
    """Take an optimizer step on loss + λ·R_s(γ) (Eq. 1) and clamp γ: replaces `optimizer.step()`.

    The subgradient is added once per call, to unscaled gradients: after `scaler.unscale_`, inside
    `scaler.step`, and for optimizers that unscale in their own kernel. A step that the scaler skips
    moves no γ. Call it where `optimizer.step()` stood, after any clipping: the clip sees the task
    gradients alone. One γ without gradient counts as a zero task gradient. A frozen γ
    (`requires_grad=False`) counts in n and in the mean γ̄, and does not move.

    For `torch.optim.SGD` itself, subgradient, update and clamp of all γ are one kernel, and
    `optimizer.step()` is left the other parameters; the γ's `momentum_buffer` stays in
    `optimizer.state`, so state dicts interchange with a plain run. Elsewhere the subgradient is
    left in γ.grad, as if R_s had been part of the loss.

    Args:
        optimizer: any `torch.optim.Optimizer` that steps once per call (not LBFGS).
        scales: the scaling factors γ; all that are trainable must be in `optimizer`.
        reg: what is penalized; `lam`, `t`, `upper` are read anew at each step.
        scaler: the `GradScaler` that scaled the loss; `scaler.step(optimizer)` is called for you,
            `scaler.update()` is not.
        closure: as for `optimizer.step(closure)`; the subgradient follows each evaluation.

    Returns:
        What `optimizer.step()` or `scaler.step(optimizer)` returns.

    Raises:
        StepError: no γ has a gradient, all γ are frozen, or the optimizer cannot be served.
        ScalingFactorError: a trainable γ is not in the optimizer, or cannot be addressed.
        ArgumentError: a closure together with an enabled scaler.
    """
    if torch.compiler.is_dynamo_compiling():  # a clean graph break: nothing below is traced
        return torch.compiler.disable(step)(optimizer, scales, reg, scaler, closure)
    _check_optimizer(optimizer)
    _refuse_second(optimizer, scales)
    scaling = scaler is not None and scaler.is_enabled()
    if closure is None:
        Binding.of(scales).require_gradient()
    elif scaling:
        raise ArgumentError(
            "closure= with an enabled scaler=: torch's GradScaler takes no closure; give one"
        )
    work = StepHooks(scales, reg, may_fuse=closure is None and _plain_sgd(optimizer))
    handles = work.hook(optimizer)
    try:
        if scaler is not None and scaling:
            return scaler.step(optimizer)  # which may find that this step is to be skipped
        result = optimizer.step() if closure is None else optimizer.step(closure)
    finally:
        for handle in handles:
            handle.remove()
        work.end()
    if not work.called:
        raise StepError(
            f"{type(optimizer).__name__}.step() ran without its step hooks: γ got a plain step, "
            "without λ·R_s and clamp; call the step of torch.optim.Optimizer, or of a class "
            "derived from it, that nothing replaces on the instance"
        )
    return result


def attach(optimizer: Optimizer, scales: ScalingFactors, reg: Regularizer) -> Attachment:
    """Make every later `optimizer.step()` do what `pf.step` does, for loops not of your own.

    Works through the optimizer's public step hooks, hence for `optimizer.step(closure)`,
    `scaler.step(optimizer)`, learning-rate schedulers and trainers alike. Hooks run in the order of
    registration, and are not copied when an optimizer is deep-copied or pickled.

    Args:
        optimizer: as for `pf.step`; where a trainer wraps it, the innermost optimizer.
        scales: as for `pf.step`.
        reg: as for `pf.step`.

    Returns:
        A handle; `handle.remove()`, or the end of its `with` block, undoes it.

    Raises:
        StepError: one of these γ is already attached to this optimizer.
        ArgumentError: `optimizer` is not one that takes step hooks.
    """
    _check_optimizer(optimizer)
    _refuse_second(optimizer, scales)
    return Attachment(optimizer, StepHooks(scales, reg, may_fuse=False))


class Attachment:
    """The handle that `attach` returns; also a context manager."""

    def __init__(self, optimizer: Optimizer, work: StepHooks) -> None:
        self._handles = work.hook(optimizer)

    def remove(self) -> None:
        """Leave the optimizer as it was found; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}, which takes no step hooks: "
            "pass the torch.optim.Optimizer that it wraps"
        )
    if isinstance(optimizer, LBFGS):
        raise StepError(
            "LBFGS searches along lines with the loss that the closure returns, which lacks R_s: "
            "add reg.value(scales) to the loss and call optimizer.step(closure), or use SGD or Adam"
        )
    _check_hooked(optimizer)


def _check_hooked(optimizer: Optimizer) -> None:
    """See that `optimizer.step()` runs step hooks. `Optimizer.__init__` puts them around a class's
    `step`, and `zero_grad` where a class has never called that.
    """
    own_step = vars(optimizer).get("step")
    hooked = getattr(type(optimizer).step, "hooked", False)
    scheduled = hasattr(own_step, "_wrapped_by_lr_sched")  # holds the step that it found, for good
    if own_step is not None and not getattr(own_step, "hooked", hooked and not scheduled):
        raise StepError(
            f"{type(optimizer).__name__}.step was replaced on this instance, by a learning-rate "
            "scheduler perhaps, before torch put step hooks around it: call optimizer.zero_grad() "
            "once before making the scheduler"
        )
    if not hooked:
        optimizer._patch_step_function()


def _refuse_second(optimizer: Optimizer, scales: ScalingFactors) -> None:
    """Raise StepError if one of these γ is attached already: its subgradient would count twice."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if not isinstance(owner, StepHooks):
            continue
        attached = {id(gamma) for gamma in owner.scales.values()}
        for name, gamma in scales.items():
            if id(gamma) in attached:
                raise StepError(
                    f"{name!r} is attached to this optimizer already, so its subgradient would be "
                    "added twice: call optimizer.step() alone, or remove() the handle first"
                )


def _plain_sgd(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step()` is torch's SGD and nobody else looks at gradients around it."""
    if type(optimizer) is not SGD:
        return False
    own_step = vars(optimizer).get("step")  # put there by learning-rate schedulers, or by the user
    return (
        (own_step is None or getattr(own_step, "__wrapped__", None) is SGD.step)
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not optimizer_module._global_optimizer_pre_hooks
        and not optimizer_module._global_optimizer_post_hooks
    )
