"""What surrounds one `optimizer.step()`: the pre and the post hook behind `step` and `attach`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import StepError
from ..kernels.table import Penalty, SgdStep, Table
from ..sharding import local
from .binding import Binding
from .nesting import Nesting

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..scaling.factors import ScalingFactors
    from .regularizers import Regularizer

_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class StepHooks:
    """What surrounds one `optimizer.step()`, as a pre and a post hook.

    Where a subclass's `step` calls its base class's, torch runs both hooks at both levels: only the
    outermost ones count.

    Attributes:
        scales, reg: as for `pf.step`.
        called: whether the pre hook ever ran.
    """

    def __init__(self, scales: ScalingFactors, reg: Regularizer, may_fuse: bool) -> None:
        self.scales = scales
        self.reg = reg
        self._may_fuse = may_fuse
        self._options: dict[str, Any] | None = None  # SGD's, where the fused kernel moves the γ
        self._memory: list[int] = []  # where the γ were when their addresses were read
        self.called = False
        self._nesting = Nesting()
        self._filled: list[tuple[Tensor, Tensor]] = []  # γ that had no gradient, what they got
        self._versions: list[int] = []  # of what they got, when the optimizer's turn came
        self._withheld: list[tuple[Tensor, Tensor]] = []  # γ hidden from the optimizer, their .grad

    def hook(self, optimizer: Optimizer) -> tuple[RemovableHandle, RemovableHandle]:
        return (
            optimizer.register_step_pre_hook(self.before),
            optimizer.register_step_post_hook(self.after),
        )

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre hook. `args[0]` is the optimizer; a closure's backward is still to come."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.before)(optimizer, args, kwargs)
        if kwargs.get("grad_scaler") is not None:
            raise StepError(
                f"{type(optimizer).__name__}.step() takes the GradScaler itself (deprecated by "
                "torch), so polarfast cannot tell whether gradients are scaled: call "
                "scaler.unscale_(optimizer), then pf.step without a scaler"
            )
        self.called = True
        if not self._nesting.enter():
            return None
        self._recover()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin(optimizer)
            return None

        def penalized() -> Any:
            loss = closure()
            self._begin(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], penalized, *args[2:]), kwargs
        return args, {**kwargs, "closure": penalized}

    def _begin(self, optimizer: Optimizer) -> None:
        """The gradients are there: add λ·∂R_s to them, or keep the γ for the fused step."""
        try:
            self._penalize(optimizer)
        except BaseException:
            self.put_back()
            raise
        self._versions = [grad._version for _, grad in self._filled]

    def _penalize(self, optimizer: Optimizer) -> None:
        binding, reg = Binding.of(self.scales), self.reg
        binding.check_members(optimizer)
        gammas = binding.trainable
        groups = [optimizer.param_groups[i] for i in binding.groups]
        options = self._options = self._fused_options(optimizer, groups)
        buffers = optimizer.state if options and options["momentum"] else None
        table = binding.table(reg)
        if table.refresh(buffers) < len(gammas) or not gammas:
            binding.require_gradient()
            self._fill(gammas)
            table.refresh(buffers)
        binding.warn_before_clamp(reg)
        scale = _amp_scalar(optimizer, "grad_scale", table.device)
        reg.steer(self.scales, scale, any(group.get("maximize", False) for group in groups))
        if len(gammas) < len(binding.params):  # a stale gradient would move a frozen γ
            self._withhold(param for param in binding.params if not param.requires_grad)
        if options:
            self._withhold(gammas)
            return
        maximize = _shared_maximize(groups)
        lam = -reg.lam if maximize else reg.lam
        table.add_subgradient_(Penalty(reg.kind, lam, reg.t, reg.per_layer), scale)
        self._memory = [gamma.data_ptr() for gamma in binding.params]

    def _fused_options(
        self, optimizer: Optimizer, groups: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The one set of arguments with which SGD would step every γ; None if there is none."""
        if not self._may_fuse or Binding.of(self.scales).sharded:
            return None
        if any(group["differentiable"] for group in groups):
            return None
        options = {key: group[key] for group in groups for key in _SGD_OPTIONS}
        for group in groups:
            for key, value in options.items():
                if isinstance(group[key], Tensor) or group[key] != value:
                    return None
        buffers = 0
        if options["momentum"] != 0:
            state, gammas = optimizer.state, Binding.of(self.scales).trainable
            buffers = sum(state[gamma].get("momentum_buffer") is not None for gamma in gammas)
            if 0 < buffers < len(gammas):
                return None  # SGD makes the missing ones, and dampens the others
        return {**options, "first_step": buffers == 0}

    def _fill(self, gammas: Iterable[Tensor]) -> None:
        """A γ without gradient gets a zero one for this step: weight decay and λ·∂R_s still act."""
        for gamma in gammas:
            if gamma.grad is None:
                gamma.grad = torch.zeros_like(gamma)
                self._filled.append((gamma, gamma.grad))

    def _withhold(self, gammas: Iterable[Tensor]) -> None:
        """Hide γ from the optimizer: it passes over parameters that have no gradient."""
        for gamma in gammas:
            grad = gamma.grad
            if grad is not None:
                self._withheld.append((gamma, grad))
                gamma.grad = None

    def put_back(self) -> None:
        """Gradients as the caller left them: withheld ones return, filled-in ones go."""
        for gamma, grad in self._withheld:
            gamma.grad = grad
        for gamma, _ in self._filled:
            gamma.grad = None
        self._forget()

    def end(self) -> None:
        """After a step that is not followed by another with these hooks, however it ended."""
        self.put_back()
        self._nesting.clear()

    def _recover(self) -> None:
        """As `put_back`, after a step that raised: gradients may have been made anew since."""
        for gamma, grad in self._withheld:
            if gamma.grad is None:
                gamma.grad = grad
        for (gamma, grad), version in zip(self._filled, self._versions, strict=True):
            if gamma.grad is grad and grad._version == version:
                gamma.grad = None
        self._forget()

    def _forget(self) -> None:
        self._withheld.clear()
        self._filled.clear()
        self._versions.clear()

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Post hook: the fused step of the γ or their clamp, then the clamp of the others."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.after)(optimizer, args, kwargs)
        if not self._nesting.leave():
            return
        binding, reg = Binding.of(self.scales), self.reg
        table = binding.table(reg)
        found_inf = _amp_scalar(optimizer, "found_inf", table.device)
        if self._options is not None:
            self._fused_step(optimizer, table, self._options)
        elif reg.upper is not None:
            if self._memory != [gamma.data_ptr() for gamma in binding.params]:
                table.refresh()  # some optimizers, and hooks, assign to param.data
            table.clamp_(reg.upper, found_inf)
        if reg.clamp == "all" and reg.upper is not None and not _is_set(found_inf):
            self._clamp_others(reg.upper)
        self.put_back()

    def _fused_step(self, optimizer: Optimizer, table: Table, options: dict[str, Any]) -> None:
        found_inf = _amp_scalar(optimizer, "found_inf", table.device)
        if _is_set(found_inf):
            return
        if options["first_step"] and options["momentum"] != 0:
            # Zeros, not empty: on a GPU this step may yet turn out to be skipped.
            for gamma, grad in self._withheld:
                if gamma.requires_grad:
                    optimizer.state[gamma]["momentum_buffer"] = torch.zeros_like(gamma)
                gamma.grad = grad
            table.refresh(optimizer.state)
        reg = self.reg
        table.sgd_step_(
            Penalty(reg.kind, reg.lam, reg.t, reg.per_layer),
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
