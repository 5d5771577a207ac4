"""What surrounds one `optimizer.step()`: the pre and the post hook behind `step` and `attach`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .binding import Binding
from .errors import StepError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .kernels.table import ScaleTable
    from .regularizers import Regularizer
    from .scaling import ScalingFactors

_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class StepHooks:
    """What surrounds one `optimizer.step()`, as a pre and a post hook."""

    def __init__(self, scales: ScalingFactors, reg: Regularizer, may_fuse: bool) -> None:
        self.scales = scales
        self.reg = reg
        self._may_fuse = may_fuse
        self._options: dict[str, Any] | None = None  # SGD's, where the fused kernel moves the γ
        self._filled: list[Tensor] = []  # γ that had no gradient
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
        self._filled.clear()
        self._withheld.clear()
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
        binding, reg = Binding.of(self.scales), self.reg
        binding.check_members(optimizer)
        table = binding.table(reg)
        if table.refresh() < len(binding.trainable) or not binding.trainable:
            binding.require_gradient()
            self._fill(binding.trainable)
            table.refresh()
        binding.warn_before_clamp(reg)
        groups = [optimizer.param_groups[i] for i in binding.groups]
        maximize = groups[0].get("maximize", False)
        if any(group.get("maximize", False) != maximize for group in groups):
            raise StepError(
                "parameter groups that hold scaling factors disagree on maximize=: "
                "give them one value (λ·R_s is minimized whatever it is)"
            )
        if len(binding.trainable) < len(binding.params):  # a stale gradient would move a frozen γ
            self._withhold(param for param in binding.params if not param.requires_grad)
        self._options = self._fused_options(optimizer, groups, binding.trainable)
        if self._options is not None:
            self._withhold(binding.trainable)
            return
        lam = -reg.lam if maximize else reg.lam
        scale = _amp_scalar(optimizer, "grad_scale", table.device)
        table.add_subgradient_(reg.kind, lam, reg.t, reg.per_layer, scale)

    def _fused_options(
        self, optimizer: Optimizer, groups: list[dict[str, Any]], gammas: Sequence[Tensor]
    ) -> dict[str, Any] | None:
        """SGD's arguments if one kernel call can stand for SGD on all `gammas`; None if not."""
        if not self._may_fuse or any(group["differentiable"] for group in groups):
            return None
        options = {key: groups[0][key] for key in _SGD_OPTIONS}
        for group in groups:
            for key, value in options.items():
                if isinstance(group[key], Tensor) or group[key] != value:
                    return None
        buffers = 0
        if options["momentum"] != 0:
            state = optimizer.state
            buffers = sum(state[gamma].get("momentum_buffer") is not None for gamma in gammas)
            if 0 < buffers < len(gammas):
                return None  # SGD makes the missing ones, and dampens the others
        return {**options, "first_step": buffers == 0}

    def _fill(self, gammas: Iterable[Tensor]) -> None:
        """A γ without gradient gets a zero one for this step: weight decay and λ·∂R_s still act."""
        for gamma in gammas:
            if gamma.grad is None:
                gamma.grad = torch.zeros_like(gamma)
                self._filled.append(gamma)

    def _withhold(self, gammas: Iterable[Tensor]) -> None:
        """Hide γ from the optimizer: it passes over parameters that have no gradient."""
        for gamma in gammas:
            if gamma.grad is not None:
                self._withheld.append((gamma, gamma.grad))
                gamma.grad = None

    def put_back(self) -> None:
        """Gradients as the caller left them: withheld ones return, filled-in ones go."""
        for gamma, grad in self._withheld:
            gamma.grad = grad
        for gamma in self._filled:
            gamma.grad = None
        self._withheld.clear()
        self._filled.clear()

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Post hook: the fused step of the γ or their clamp, then the clamp of the others."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.after)(optimizer, args, kwargs)
        binding, reg = Binding.of(self.scales), self.reg
        table = binding.table(reg)
        found_inf = _amp_scalar(optimizer, "found_inf", table.device)
        if self._options is not None:
            self._fused_step(optimizer, table, found_inf, **self._options)
        elif reg.upper is not None:
            table.refresh()  # an optimizer may have moved a γ to other memory
            table.clamp_(reg.upper, found_inf)
        others = binding.others_table() if reg.clamp == "all" else None
        if others is not None and reg.upper is not None:
            others.refresh()
            others.clamp_(reg.upper, found_inf)
        self.put_back()

    def _fused_step(
        self,
        optimizer: Optimizer,
        table: ScaleTable,
        found_inf: Tensor | None,
        first_step: bool,
        **options: Any,
    ) -> None:
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            return
        momentum = options["momentum"] != 0
        if first_step and momentum:
            # Zeros, not empty: on a GPU this step may yet turn out to be skipped.
            for gamma in Binding.of(self.scales).trainable:
                optimizer.state[gamma]["momentum_buffer"] = torch.zeros_like(gamma)
        for gamma, grad in self._withheld:
            gamma.grad = grad
        table.refresh(optimizer.state if momentum else None)
        reg = self.reg
        table.sgd_step_(
            reg.kind,
            reg.lam,
            reg.t,
            reg.per_layer,
            **options,
            upper=reg.upper,
            first_step=first_step,
            grad_scale=_amp_scalar(optimizer, "grad_scale", table.device),
            found_inf=found_inf,
        )


def _amp_scalar(optimizer: Optimizer, name: str, device: torch.device) -> Tensor | None:
    """What GradScaler leaves on an optimizer that unscales in its own kernel, else None."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scalar = getattr(optimizer, name, None)
    return None if scalar is None else scalar.to(device, non_blocking=True)
