"""The training step: λ·∂R_s/∂γ around the user's own optimizer, then γ clamped to [0, upper]."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim import optimizer as optimizer_module

from ..errors import ArgumentError, StepError
from ..kernels.table import SgdStep, Table
from ..sharding import local
from .binding import Binding
from .regularizers import Regularizer

if TYPE_CHECKING:
    from torch.amp import GradScaler

    from ..scaling.factors import ScalingFactors

#: The steps on their way, in all threads; changed under the lock.
_UNDERWAY: list[_Work] = []
_CLAIMING = threading.Lock()

_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


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
    left in γ.grad, as if R_s had been part of the loss. Step hooks, yours and torch's global ones,
    see it there, and γ that are yet to be clamped.

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
        StepError: no γ has a gradient, all γ are frozen, one is attached to the optimizer already,
            another step on one of them is on its way (in another thread), or the optimizer cannot
            be served.
        ScalingFactorError: a trainable γ is not in the optimizer, or cannot be addressed.
        ArgumentError: a closure together with an enabled scaler; or `optimizer` is a trainer's
            wrapper of an optimizer, or none at all.
    """
    if torch.compiler.is_dynamo_compiling():  # a clean graph break: nothing below is traced
        return torch.compiler.disable(step)(optimizer, scales, reg, scaler, closure)
    _check_arguments(optimizer, scales, reg)
    scaling = scaler is not None and scaler.is_enabled()
    if closure is not None and scaling:
        raise ArgumentError(
            "closure= with an enabled scaler=: torch's GradScaler takes no closure; give one"
        )
    work = _Work(scales, reg, may_fuse=closure is None and _plain_sgd(optimizer))
    try:
        work.claim()
        if closure is not None:
            return work.run(optimizer, optimizer.step, closure)
        Binding.of(scales).require_gradient()
        if scaler is None or not scaling:
            return work.run(optimizer, optimizer.step)
        with Attachment(optimizer, work):
            return scaler.step(optimizer)  # which may find that this step is to be skipped
    finally:
        work.release()


def attach(optimizer: Optimizer, scales: ScalingFactors, reg: Regularizer) -> Attachment:
    """Make every later `optimizer.step()` do what `pf.step` does, for loops not of your own.

    Wraps `optimizer.step` on the instance, as torch's learning-rate schedulers do, hence for
    `optimizer.step(closure)`, `scaler.step(optimizer)`, schedulers and trainers alike. An
    optimizer that is deep-copied or pickled leaves the wrapper behind.

    Attach before something takes `optimizer.step` to call it later, as `accelerator.prepare` does
    where there is a GradScaler: a step past the wrapper raises StepError.

    Args:
        optimizer: as for `pf.step`; where a trainer wraps it, the innermost optimizer.
        scales: as for `pf.step`.
        reg: as for `pf.step`.

    Returns:
        A handle; `handle.remove()`, or the end of its `with` block, undoes it.

    Raises:
        StepError: one of these γ is already attached to this optimizer, or it is LBFGS.
        ArgumentError: `optimizer` is a trainer's wrapper of an optimizer, or none at all.
    """
    _check_arguments(optimizer, scales, reg)
    return Attachment(optimizer, _Work(scales, reg, may_fuse=False))


class Attachment:
    """The handle that `attach` returns; also a context manager."""

    def __init__(self, optimizer: Optimizer, work: _Work) -> None:
        self._optimizer = weakref.ref(optimizer)
        # The hook does no work. It is how the wrapper finds what is attached (copies of an
        # optimizer leave hooks behind), and it sees steps that pass the wrapper by.
        self._handle = optimizer.register_step_pre_hook(work.refuse_alone)
        if not isinstance(vars(optimizer).get("step"), _Wrapper):
            optimizer.step = _Wrapper(optimizer)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the optimizer as it was found; a second call does nothing."""
        self._handle.remove()
        optimizer = self._optimizer()
        if optimizer is None or _attached(optimizer):
            return
        wrapper = vars(optimizer).get("step")
        if isinstance(wrapper, _Wrapper):  # else under another's, where it does nothing any more
            if wrapper.found is None:
                del optimizer.step
            else:
                optimizer.step = wrapper.found  # type: ignore[method-assign]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Wrapper:
    """`optimizer.step` on the instance: the step found there with all that is attached around it.

    Attributes:
        found: what another had put there; None: the class's own.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        found = vars(optimizer).get("step")
        self._like = found or type(optimizer).step
        functools.update_wrapper(self, self._like)  # its signature, and a scheduler's mark
        self.found = found
        self._optimizer = weakref.ref(optimizer)  # which has the wrapper: no cycle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer that this step belongs to is gone")
        take = self.found or functools.partial(type(optimizer).step, optimizer)
        for work in _attached(optimizer):
            take = functools.partial(work.run, optimizer, take)
        return take(*args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """What a scheduler made later puts its own wrapper around, and binds to the optimizer."""
        return functools.wraps(self._like)(lambda optimizer, *args, **kwargs: self(*args, **kwargs))


class _Work:
    """What surrounds one `optimizer.step()`.

    Attributes:
        scales, reg: as for `pf.step`.
        running: whether a step is on its way; one within it gets nothing more.
    """

    def __init__(self, scales: ScalingFactors, reg: Regularizer, may_fuse: bool) -> None:
        self.scales = scales
        self.reg = reg
        self.running = False
        self._may_fuse = may_fuse
        self._thread: int | None = None  # that has the γ to itself
        self._options: dict[str, Any] | None = None  # SGD's, where the fused kernel moves the γ
        self._table: Table | None = None  # what the gradients of this step were read into
        self._replaced: list[tuple[Tensor, Tensor | None]] = []  # γ, the .grad that it had
        self._withheld: list[tuple[dict[str, Any], list[Tensor]]] = []  # group, its parameters

    def run(self, optimizer: Optimizer, take: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`take(*args, **kwargs)`, a step of the optimizer: λ·∂R_s before it, the clamp after it.

        However it ends, gradients are then as the caller left them, but for λ·∂R_s.
        """
        if self.running and self._thread == threading.get_ident():
            return take(*args, **kwargs)
        if kwargs.get("grad_scaler") is not None:
            raise StepError(
                f"{type(optimizer).__name__}.step() takes the GradScaler itself (deprecated by "
                "torch), so polarfast cannot tell whether gradients are scaled: call "
                "scaler.unscale_(optimizer), then pf.step without a scaler"
            )
        closure: Any = args[0] if args else kwargs.get("closure")

        def penalized() -> Any:
            loss = closure()
            self._begin(optimizer)
            return loss

        claimed: bool | None = None  # not known where an interrupt comes in between
        try:
            claimed = self.claim()
            self.running = True
            try:
                if closure is None:
                    self._begin(optimizer)
                elif args:
                    args = (penalized, *args[1:])
                else:
                    kwargs["closure"] = penalized
                result = take(*args, **kwargs)
                self._finish(optimizer)
            finally:
                self.running, self._table = False, None
                self._put_back()
        finally:
            if claimed is not False:
                self.release()
        return result

    def claim(self) -> bool:
        """Keep other steps from these γ until `release`; False: this step had them already.

        Within a step, gradients are withheld from the optimizer or have λ·∂R_s in them: another
        one would find none, or add it twice.

        Raises:
            StepError: another step on one of these γ is on its way.
        """
        if torch.compiler.is_dynamo_compiling():
            return bool(torch.compiler.disable(self.claim)())
        thread = threading.get_ident()
        with _CLAIMING:
            for other in _UNDERWAY:
                if other is self and self._thread == thread:
                    return False
                if (name := _shared(other, self)) is not None:
                    raise StepError(
                        f"another step on {name!r} is on its way"
                        f"{'' if other._thread == thread else ', in another thread'}: take one "
                        "step at a time on a set of scaling factors (hold a lock around pf.step)"
                    )
            self._thread = thread
            _UNDERWAY.append(self)
        return True

    def release(self) -> None:
        """Let other steps have the γ, if this thread has them."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.release)()
        with _CLAIMING:
            if self in _UNDERWAY and self._thread == threading.get_ident():
                _UNDERWAY.remove(self)
                self._thread = None

    def refuse_alone(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Pre hook: raise StepError in a step that does not come through `run`."""
        if not self.running:
            raise StepError(
                f"this {type(optimizer).__name__}.step was taken from the optimizer before "
                "pf.attach, and γ would get a plain step: attach before the optimizer is given to "
                "what keeps its step (accelerator.prepare does, with a GradScaler)"
            )

    def _begin(self, optimizer: Optimizer) -> None:
        """The gradients are there: add λ·∂R_s to them, or keep the γ for the fused step."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self._begin)(optimizer)
        binding, reg = Binding.of(self.scales), self.reg
        binding.check_members(optimizer)
        gammas = binding.trainable
        groups = [optimizer.param_groups[i] for i in binding.groups]
        options = self._fused_options(binding, groups)
        momentum_of = optimizer.state if options and options["momentum"] else None
        table = self._table = binding.table(reg)
        if table.refresh(momentum_of) < len(gammas) or not gammas:
            binding.require_gradient()
            for gamma in gammas:
                if gamma.grad is None:  # weight decay and λ·∂R_s still act
                    self._replace_grad(gamma, torch.zeros_like(gamma))
            table.refresh(momentum_of)
        if options and momentum_of is not None:
            buffers = table.buffered()
            options["first_step"] = buffers == 0
            if 0 < buffers < len(gammas):
                options = None  # SGD makes the missing ones, and dampens the others
        self._options = options
        binding.warn_before_clamp(reg)
        binding.warn_if_stepped_twice()
        scale = _amp_scalar(optimizer, "grad_scale", table.device)
        reg.steer(self.scales, optimizer, scale)
        binding.note_step(reg, groups[0])
        if reg.centers is not None:
            table.centers = reg.centers
        if options:
            # In one assignment a group, where taking each γ's gradient away costs more than the
            # whole update of the γ.
            for i, others in binding.others:
                group = optimizer.param_groups[i]
                self._withheld.append((group, group["params"]))
                group["params"] = others
            return
        for gamma in binding.frozen:  # which a stale gradient would move
            if gamma.grad is not None:
                self._replace_grad(gamma, None)
        maximize = _shared_maximize(groups)
        penalty = reg.penalty()
        lam = -penalty.lam if maximize else penalty.lam
        table.add_subgradient_(penalty._replace(lam=lam), scale)

    def _fused_options(
        self, binding: Binding, groups: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The one set of arguments with which SGD would step every γ; None if there is none."""
        if not self._may_fuse or binding.sharded or not groups:
            return None
        options = {key: groups[0][key] for key in _SGD_OPTIONS}
        for group in groups:
            values = [group[key] for key in _SGD_OPTIONS]
            if group["differentiable"] or any(isinstance(value, Tensor) for value in values):
                return None
            if values != list(options.values()):
                return None
        options["first_step"] = True
        return options

    def _replace_grad(self, gamma: Tensor, grad: Tensor | None) -> None:
        self._replaced.append((gamma, gamma.grad))
        gamma.grad = grad

    def _put_back(self) -> None:
        while self._withheld:
            group, params = self._withheld.pop()
            group["params"] = params
        while self._replaced:
            gamma, grad = self._replaced.pop()
            gamma.grad = grad

    def _finish(self, optimizer: Optimizer) -> None:
        """The fused step of the γ or their clamp, then the clamp of the others."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self._finish)(optimizer)
        reg = self.reg
        # That of `_begin`: another one would find no gradients. None: the closure was not called.
        table = self._table or Binding.of(self.scales).table(reg)
        found_inf = _amp_scalar(optimizer, "found_inf", table.device)
        if self._options is not None:
            self._fused_step(optimizer, table, self._options, found_inf)
        elif reg.upper is not None:
            table.clamp_(reg.upper, found_inf)
        if reg.clamp == "all" and reg.upper is not None and not _is_set(found_inf):
            self._clamp_others(reg.upper)
        reg.settle(self.scales)
        Binding.of(self.scales).note_end()

    def _fused_step(
        self,
        optimizer: Optimizer,
        table: Table,
        options: dict[str, Any],
        found_inf: Tensor | None,
    ) -> None:
        if _is_set(found_inf):
            return
        if options["first_step"] and options["momentum"] != 0:
            # Zeros, not empty: on a GPU this step may yet turn out to be skipped.
            for gamma in Binding.of(self.scales).trainable:
                optimizer.state[gamma]["momentum_buffer"] = torch.zeros_like(gamma)
            table.refresh(optimizer.state)
        reg = self.reg
        table.sgd_step_(
            reg.penalty(),
            SgdStep(**options, upper=reg.upper),
            grad_scale=_amp_scalar(optimizer, "grad_scale", table.device),
            found_inf=found_inf,
        )

    @torch.no_grad()
    def _clamp_others(self, upper: float) -> None:
        others: list[Tensor] = [
            local(param) for param in self.scales.others.values() if param.requires_grad
        ]
        if others:
            torch._foreach_clamp_min_(others, 0.0)
            torch._foreach_clamp_max_(others, upper)


def _shared(work: _Work, other: _Work) -> str | None:
    """The name of a γ that both steps would move; None: there is none."""
    gammas = {id(gamma) for gamma in work.scales.values()}
    return next((name for name, gamma in other.scales.items() if id(gamma) in gammas), None)


def _attached(optimizer: Optimizer) -> list[_Work]:
    owners = (
        getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()
    )
    return [owner for owner in owners if isinstance(owner, _Work)]


def _check_arguments(optimizer: Optimizer, scales: ScalingFactors, reg: Regularizer) -> None:
    if not isinstance(optimizer, Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise ArgumentError(
            f"optimizer is a {type(optimizer).__name__}, which has none of an optimizer's parts: "
            "pass the torch.optim.Optimizer that it wraps"
        )
    if not isinstance(scales, Mapping) or not isinstance(reg, Regularizer):
        raise ArgumentError(
            "pf.step(optimizer, scales, reg) and pf.attach were given a "
            f"{type(scales).__name__} as scales and a {type(reg).__name__} as reg: scales are what "
            "pf.scaling_factors returned, reg is a pf.Polarization, pf.FlopsTarget or the like"
        )
    if isinstance(optimizer, LBFGS):
        raise StepError(
            "LBFGS searches along lines with the loss that the closure returns, which lacks R_s: "
            "add reg.value(scales) to the loss and call optimizer.step(closure), or use SGD or Adam"
        )
    for work in _attached(optimizer):
        attached = {id(gamma) for gamma in work.scales.values()}
        twice = [name for name, gamma in scales.items() if id(gamma) in attached]
        if twice:
            raise StepError(
                f"{twice[0]!r} is attached to this optimizer already, so its subgradient would be "
                "added twice: call optimizer.step() alone, or remove() the handle first"
            )


def _plain_sgd(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step()` is torch's SGD and nobody else looks at gradients around it."""
    if type(optimizer) is not SGD:
        return False
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        optimizer_module._global_optimizer_pre_hooks,
        optimizer_module._global_optimizer_post_hooks,
    )
    own_step = vars(optimizer).get("step")  # put there by learning-rate schedulers, or by the user
    unchanged = own_step is None or getattr(own_step, "__wrapped__", None) is SGD.step
    return unchanged and not any(hooks)


def _is_set(found_inf: Tensor | None) -> bool:
    """Whether this step is known to be skipped; a GPU is not asked: that would synchronize."""
    return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)


def _shared_maximize(groups: list[dict[str, Any]]) -> bool:
    values = {bool(group.get("maximize", False)) for group in groups}
    if len(values) > 1:
        raise StepError(
            "parameter groups that hold scaling factors disagree on maximize=: "
            "give them one value (λ·R_s is minimized whatever it is)"
        )
    return values.pop()


def _amp_scalar(optimizer: Optimizer, name: str, device: torch.device) -> Tensor | None:
    """What GradScaler leaves on an optimizer that unscales in its own kernel, else None."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scalar = getattr(optimizer, name, None)
    return None if scalar is None else scalar.to(device, non_blocking=True)
