"""The γ work of a training step where each process holds a few channels of every layer.

The subgradient is elementwise but for a few sums over channels: each process works on its own
channels and those sums are all-reduced. Nothing is gathered, and no process waits for a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import ScalingFactorError
from ..sharding import Sharding, local, whole
from .polarize_ref import KIND_DEEPHOYER, KIND_L1
from .table import ScaleTable


class ShardedTable:
    """What `ScaleTable` does, for γ that are DTensors, but for the fused SGD step.

    Two all-reduces of one number each for Polarization (of L numbers for a mean over each of L
    layers), one of 2L for DeepHoyer, none for L1. All sums are float64.

    Args:
        names, params, weights: as for `ScaleTable`.

    Raises:
        ScalingFactorError: the γ are not all sharded alike; the message names one.
    """

    def __init__(
        self, names: Sequence[str], params: Sequence[Tensor], weights: Sequence[float] | None
    ) -> None:
        self.names, self.params = tuple(names), tuple(params)
        self._sharding = Sharding(dict(zip(names, params, strict=True)))
        parts = [local(param) for param in params]
        self.dtype, self.device = parts[0].dtype, parts[0].device
        for name, part in zip(names, parts, strict=True):
            if not part.is_floating_point() or (part.dtype, part.device) != (
                self.dtype,
                self.device,
            ):
                raise ScalingFactorError(
                    f"{name!r} is {part.dtype} on {part.device}, but {self.names[0]!r} is "
                    f"{self.dtype} on {self.device}; all must be of one floating-point dtype on "
                    "one device"
                )
        self._sizes = [part.numel() for part in parts]
        self._lengths = torch.tensor(self._sizes, device=self.device)
        numbers = [float(param.numel()) for param in params]
        self._numel = sum(numbers)
        self._numbers = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._weights = torch.tensor(
            [1.0] * len(parts) if weights is None else list(weights),
            dtype=torch.float64,
            device=self.device,
        )
        self._row = torch.arange(len(parts), device=self.device).repeat_interleave(self._lengths)
        self._moving: list[tuple[int, Tensor]] = []  # of γ with a gradient: row, local gradient

    def refresh(self, momentum_of: Any = None) -> int:
        """Find the gradients anew; how many γ have one.

        Raises:
            ScalingFactorError: a gradient is not cut as its γ is; the message names it.
        """
        self._moving = []
        for row, param in enumerate(self.params):
            grad = param.grad
            if grad is None or not param.requires_grad:
                continue
            placements = getattr(grad, "placements", None)
            if placements != self._sharding.placements:
                raise ScalingFactorError(
                    f"the gradient of {self.names[row]!r} is placed as {placements}, and the "
                    f"factor as {self._sharding.placements}: leave gradients as fully_shard "
                    "reduces them"
                )
            self._moving.append((row, local(grad)))
        return len(self._moving)

    @torch.no_grad()
    def add_subgradient_(
        self, kind: int, lam: float, t: float, per_layer: bool, grad_scale: Tensor | None = None
    ) -> None:
        """γ.grad += grad_scale · λ · ∂R/∂γ for every γ that has a gradient (polarize_ref.py)."""
        gamma = torch.cat([local(param).reshape(-1) for param in self.params]).double()
        added = lam * self._subgradient(gamma, kind, t, per_layer)
        if grad_scale is not None:
            added *= grad_scale.double()
        pieces = added.to(self.dtype).split(self._sizes)
        held = [(row, grad) for row, grad in self._moving if grad.numel()]
        if held:
            grads = [grad for _, grad in held]
            torch._foreach_add_(grads, [pieces[row].view_as(grad) for row, grad in held])
        increment_version([grad for _, grad in self._moving])

    def _subgradient(self, gamma: Tensor, kind: int, t: float, per_layer: bool) -> Tensor:
        """∂R/∂γ of the γ held here, float64 [k]."""
        weight, sum_over = self._weights[self._row], self._sharding.sum
        if kind == KIND_L1:
            return weight * gamma.sign()
        if kind == KIND_DEEPHOYER:
            norms, squares = sum_over(
                torch.stack((self._by_layer(gamma.abs()), self._by_layer(gamma.square())))
            )
            a = 2 * self._weights * norms / torch.where(squares > 0, squares, 1.0)
            b = -a * norms / torch.where(squares > 0, squares, 1.0)
            return a[self._row] * gamma.sign() + b[self._row] * gamma
        if per_layer:
            means = sum_over(self._by_layer(gamma)) / self._numbers
            away = weight * (gamma - means[self._row]).sign()
            offset = (sum_over(self._by_layer(away)) / self._numbers)[self._row]
        else:
            mean = sum_over(gamma.sum()) / self._numel
            away = weight * (gamma - mean).sign()
            offset = sum_over(away.sum()) / self._numel
        return t * weight * gamma.sign() - away + offset

    def _by_layer(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)

    @torch.no_grad()
    def clamp_(self, upper: float, found_inf: Tensor | None = None) -> None:
        """γ ← min(max(γ, 0), upper) for every γ that has a gradient, unless found_inf is not 0."""
        moving = [self.params[row] for row, _ in self._moving]
        parts = [part for part in map(local, moving) if part.numel()]
        if parts:
            clamped = list(torch._foreach_clamp_max(torch._foreach_clamp_min(parts, 0.0), upper))
            if found_inf is not None:
                skip = found_inf != 0
                clamped = [
                    torch.where(skip, old, new) for old, new in zip(parts, clamped, strict=True)
                ]
            torch._foreach_copy_(parts, clamped)
        increment_version(moving)

    def valley(self) -> tuple[Tensor, Tensor]:
        """As `ScaleTable.valley`, of all channels: one collective."""
        with torch.no_grad():
            gammas = whole(dict(zip(self.names, self.params, strict=True)))
        return ScaleTable(self.names, tuple(gammas.values())).valley()
