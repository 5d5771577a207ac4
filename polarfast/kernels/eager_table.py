"""The table in plain torch: the readable statement of the formulas, and what runs where no kernel
of ours does: on γ that are cut over processes (DTensors), and on devices that we do not know.

Eq. 2 of "Neuron-level Structured Pruning using Polarization Regularizer" (NeurIPS 2020), with layer
weights w and the mean over all γ of the network differentiated through:

    R_s(γ) = Σ_i w_i (t |γ_i| − |γ_i − mean|)
    ∂R_s/∂γ_j = w_j (t sgn γ_j − sgn(γ_j − mean)) + 1/n Σ_i w_i sgn(γ_i − mean)

Its variants: another mean (of each layer, or weighted by w); the mean not differentiated through
(no last term); squares about the mean in place of absolute values (2(γ − mean) for the sgn).

Every regularizer's subgradient but DeepHoyer's (`_hoyer`) is  a_l sgn γ_j + b_l γ_j +
c_l sgn(γ_j − m_l) + k_l  with l the layer of γ_j, which is how the kernels compute it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import ScalingFactorError
from ..sharding import Sharding, is_sharded, local, whole
from .table import BINS, Kind, Penalty, SgdStep, Table


class _Moving(NamedTuple):
    """A γ that has a gradient. What the optimizer owns is not kept alive: it may be large."""

    row: int
    grad: weakref.ref[Tensor]
    buffer: weakref.ref[Tensor] | None


class EagerTable(Table):
    """As `Table`; the γ may be DTensors, all sharded alike.

    Each process then works on its own channels, and the sums over channels are all-reduced: two of
    one number each for Polarization (of L numbers for a mean over each of L layers), one of 2L for
    DeepHoyer, none for L1. Nothing is gathered, but by `valley`, and no process waits for a number.

    Raises:
        ScalingFactorError: the γ are not all sharded alike; the message names one.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        tilts: Sequence[float] | None = None,
    ) -> None:
        super().__init__(names, params, weights, tilts)
        self._sharding: Sharding | None = None
        if any(map(is_sharded, self.params)):
            self._sharding = Sharding(dict(zip(self.names, self.params, strict=True)))
        # All sums are float64; Apple's GPUs have none.
        self._wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._sizes = [local(param).numel() for param in self.params]  # of what is held here
        self._lengths = torch.tensor(self._sizes, device=self.device)
        self._row = torch.arange(len(self.params), device=self.device).repeat_interleave(
            self._lengths
        )
        self._weights = torch.tensor(self._row_weights, dtype=self._wide, device=self.device)
        self._tilt = torch.tensor(self._tilts, dtype=self._wide, device=self.device)
        self._numbers = torch.tensor(self._numels, dtype=self._wide, device=self.device)
        self._use_centers(self.centers)
        self.refresh()

    def refresh(self, momentum_of: dict[Any, Any] | None = None) -> int:
        moving: list[_Moving] = []
        for row, param in enumerate(self.params):
            if (fault := self._unusable(row, momentum_of)) is not None:
                raise ScalingFactorError(fault)
            grad = param.grad
            if grad is None or not param.requires_grad:
                continue
            self._check_placement(row, grad)
            state = {} if momentum_of is None else momentum_of.get(param, {})
            buffer = state.get("momentum_buffer")
            moving.append(
                _Moving(row, weakref.ref(grad), None if buffer is None else weakref.ref(buffer))
            )
        self._moving = moving
        return len(moving)

    def buffered(self) -> int:
        return sum(moving.buffer is not None for moving in self._moving)

    @torch.no_grad()
    def add_subgradient_(self, penalty: Penalty, grad_scale: Tensor | None = None) -> None:
        added = self._subgradient(penalty)
        if grad_scale is not None:
            added *= grad_scale.to(self._wide)
        pieces = added.to(self.dtype).split(self._sizes)
        grads = [self._alive(moving, moving.grad) for moving in self._moving]
        pairs = [
            (local(grad), pieces[moving.row])
            for moving, grad in zip(self._moving, grads, strict=True)
            if self._sizes[moving.row]
        ]
        if pairs:
            parts = [part for part, _ in pairs]
            torch._foreach_add_(parts, [piece.view_as(part) for part, piece in pairs])
        increment_version(grads)

    @torch.no_grad()
    def clamp_(self, upper: float, found_inf: Tensor | None = None) -> None:
        for moving in self._moving:
            if (fault := self._unusable(moving.row, None)) is not None:
                raise ScalingFactorError(fault)
        params = [self.params[moving.row] for moving in self._moving]
        self._write(params, self._flat(params).clamp(0, upper), found_inf)

    @torch.no_grad()
    def sgd_step_(
        self,
        penalty: Penalty,
        sgd: SgdStep,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        pieces = self._subgradient(penalty).split(self._sizes)
        subgradient = self._flat([pieces[moving.row] for moving in self._moving])
        params = [self.params[moving.row] for moving in self._moving]
        gamma = self._flat(params)
        d = self._flat([self._alive(moving, moving.grad) for moving in self._moving])
        if grad_scale is not None:
            d = d / grad_scale.to(self._wide)
        d = (-d if sgd.maximize else d) + subgradient
        if sgd.weight_decay != 0:  # no decay is no operation: 0 · inf would be NaN
            d = d + sgd.weight_decay * gamma
        if sgd.momentum != 0:
            buffers = [self._alive(moving, moving.buffer) for moving in self._moving]
            held = d
            if not sgd.first_step:
                held = sgd.momentum * self._flat(buffers) + (1 - sgd.dampening) * d
            self._write(buffers, held, found_inf)
            d = d + sgd.momentum * held if sgd.nesterov else held
        moved = gamma - sgd.lr * d
        self._write(params, moved if sgd.upper is None else moved.clamp(0, sgd.upper), found_inf)

    @torch.no_grad()
    def valley(self) -> tuple[Tensor, Tensor]:
        # Bins are those of numpy.histogram, whose edges are float32 for float32 values; what is in
        # none of them (NaN, all beyond [0, 1]) goes to one more at the end.
        gammas = list(whole(dict(zip(self.names, self.params, strict=True))).values())
        rows, flat = len(gammas), torch.cat([gamma.reshape(-1) for gamma in gammas])
        row = torch.arange(rows, device=flat.device).repeat_interleave(
            self._numbers.long(), output_size=flat.numel()
        )
        edges = (torch.arange(BINS + 1, dtype=torch.float64, device="cpu") * 0.01).float()
        edges = edges.to(flat.device)
        x = flat.float()
        bins = (torch.bucketize(x, edges, right=True) - 1).clamp(max=BINS - 1)
        bins = torch.where((x >= 0) & (x <= 1), bins, BINS)
        counts = _count(row * (BINS + 1) + bins, rows * (BINS + 1)).view(rows, -1)[:, :BINS]
        # The left edge of bin i + 1 for the first i with d[i] <= 0 <= d[i + 1], d = diff(counts).
        d = counts.diff(dim=1)
        valleys = (d[:, :-1] <= 0) & (d[:, 1:] >= 0)
        threshold = edges[valleys.int().argmax(dim=1) + 1].to(self._wide)
        threshold = torch.where(valleys.any(dim=1), threshold, torch.nan)
        cut = flat.to(self._wide) > threshold[row]
        kept = _count(row, rows, cut | threshold.isnan()[row])
        summary = torch.stack((threshold, kept, _count(row, rows, ~flat.isfinite())), dim=1)
        return summary, counts.contiguous()

    def _subgradient(self, penalty: Penalty) -> Tensor:
        """λ·∂R/∂γ of the γ held here [k]."""
        gamma, weight, sum_over = self._flat(self.params), self._weights[self._row], self._sum
        if penalty.kind == Kind.L1:
            return penalty.lam * (weight * gamma.sign())
        t = penalty.t + self._tilt[self._row]
        if penalty.kind == Kind.CENTERED:
            away = (gamma - self._at_center).sign()
            return penalty.lam * weight * (t * gamma.sign() - away)
        if penalty.kind == Kind.DEEPHOYER:
            return penalty.lam * self._hoyer(gamma)
        counted = weight if penalty.weighted else torch.ones_like(weight)  # for in the mean
        if penalty.per_layer:
            mean = (sum_over(self._by_layer(gamma)) / self._numbers)[self._row]
        else:
            mean = sum_over((counted * gamma).sum()) / self._mass(penalty)
        away = gamma - mean
        away = weight * (2 * away if penalty.kind == Kind.SQUARED else away.sign())
        added = t * weight * gamma.sign() - away
        if penalty.through and penalty.per_layer:
            added += (sum_over(self._by_layer(away)) / self._numbers)[self._row]
        elif penalty.through:
            added += counted * sum_over(away.sum()) / self._mass(penalty)
        return penalty.lam * added

    def _hoyer(self, gamma: Tensor) -> Tensor:
        """w·∂(‖γ‖₁²/‖γ‖₂²)/∂γ_j = w·2/(M·m)·sgn γ_j·((1 − x_j) − q)/m, in each layer.

        M is its largest |γ|, x = |γ|/M, q = Σ x(1 − x) / Σ x and m = 1 − q, which is Σ x² / Σ x.
        So written, no square leaves the range of numbers, and no two numbers that are almost equal
        are subtracted but those of the γ themselves.
        """
        largest = self._max(self._by_layer(gamma.abs(), "max"))
        largest = torch.where(largest == 0, 1.0, largest)  # no derivative at 0; stays where it is
        x = gamma.abs() / largest[self._row]
        rest = (largest[self._row] - gamma.abs()) / largest[
            self._row
        ]  # 1 − x, without x's rounding
        total, spread = self._sum(torch.stack((self._by_layer(x), self._by_layer(x * rest))))
        q = spread / torch.where(total == 0, 1.0, total)
        away = (rest - q[self._row]) / (1 - q)[self._row]
        slope = (2 * self._weights / (1 - q) / largest)[self._row]
        # As large as 1/γ, hence at times infinite; times 0 that would be NaN.
        size = torch.where((away == 0) | (gamma == 0), 0.0, slope * away)
        return torch.where(gamma < 0, -size, size)

    def _use_centers(self, centers: Sequence[float]) -> None:
        each = torch.tensor(centers, dtype=self._wide, device=self.device)
        self._at_center = each[self._row]  # of each γ that is held here

    def _sum(self, partial: Tensor) -> Tensor:
        return partial if self._sharding is None else self._sharding.sum(partial)

    def _max(self, partial: Tensor) -> Tensor:
        return partial if self._sharding is None else self._sharding.max(partial)

    def _by_layer(self, values: Tensor, reduce: str = "sum") -> Tensor:
        return torch.segment_reduce(values, reduce, lengths=self._lengths, unsafe=True, initial=0)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """What this process holds of them, one after the other."""
        parts = [local(tensor).reshape(-1) for tensor in tensors]
        return (torch.cat(parts) if parts else self._weights[:0]).to(self._wide)

    def _write(self, tensors: Sequence[Tensor], values: Tensor, found_inf: Tensor | None) -> None:
        """Hands values in the order of `_flat` back, unless found_inf is not 0."""
        parts = [local(tensor) for tensor in tensors]
        pieces = values.to(self.dtype).split([part.numel() for part in parts])
        pairs = [
            (part, piece.view_as(part))
            for part, piece in zip(parts, pieces, strict=True)
            if part.numel()
        ]
        if found_inf is not None:
            skip = found_inf != 0
            pairs = [(part, torch.where(skip, part, piece)) for part, piece in pairs]
        if pairs:
            torch._foreach_copy_([part for part, _ in pairs], [piece for _, piece in pairs])
        increment_version(tensors)

    def _alive(self, moving: _Moving, held: weakref.ref[Tensor] | None) -> Tensor:
        if held is None:
            raise self._no_momentum(moving.row)
        tensor = held()
        if tensor is None:
            raise ScalingFactorError(
                f"the gradient or momentum buffer of {self.names[moving.row]!r} is gone: refresh() "
                "after it is made anew"
            )
        return tensor

    def _check_placement(self, row: int, grad: Tensor) -> None:
        if self._sharding is None:
            return
        placements = getattr(grad, "placements", None)
        if placements != self._sharding.placements:
            raise ScalingFactorError(
                f"the gradient of {self.names[row]!r} is placed as {placements}, and the "
                f"factor as {self._sharding.placements}: leave gradients as fully_shard "
                "reduces them"
            )


def _count(place: Tensor, places: int, counted: Tensor | None = None) -> Tensor:
    """How often each of `places` occurs in `place`, int64; only where `counted`."""
    ones = torch.ones_like(place) if counted is None else counted.to(place.dtype)
    return torch.zeros(places, dtype=place.dtype, device=place.device).index_add_(0, place, ones)
