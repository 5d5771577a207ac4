"""What is kept about a set of scaling factors between steps, and checked anew when it changes."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ScalingFactorError, StepError
from ..kernels import Roster, table_of
from ..kernels.table import Table
from ..layers import is_gate, lost_gates
from ..sharding import is_sharded, whole

if TYPE_CHECKING:
    from ..scaling.factors import ScalingFactors
    from .regularizers import Regularizer

_MAKING = threading.Lock()
STEPS_TOO_MANY = 3


class Binding:
    """One set of scaling factors: its address table, and where an optimizer keeps each γ.

    Attributes:
        params: all γ, in order.
        sharded: whether they are DTensors.
        trainable, frozen: those with and without `requires_grad`, as of the last `check_members`.
        groups: indices of the optimizer's parameter groups that hold a trainable γ, as of then.
        others: for each group that holds a γ, its index and the parameters that are none.
        drift: how far λ·∂R_s could move a γ under SGD, in all steps so far; None: not known, since
            the steps were those of an optimizer that scales gradients.
        last: the regularizer of the last step, if it is still there.
    """

    def __init__(self, scales: ScalingFactors) -> None:
        self.names = tuple(scales)
        self.params: tuple[Tensor, ...] = tuple(scales.values())
        self.sharded = any(map(is_sharded, self.params))
        _check_sizes(scales)
        self.trainable: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self.groups: list[int] = []
        self.others: list[tuple[int, list[Tensor]]] = []
        self.drift: float | None = 0.0
        self._last: weakref.ref[Regularizer] | None = None
        self._others: Mapping[str, Tensor] = scales.others
        self._model = scales._model
        self._roster = Roster(self.params)  # as of the last check
        self._table: Table | None = None
        self._looked_at: Table | None = None  # the table of thresholds, while there was no step
        self._table_from: tuple[object, object] = (None, None)  # the table's weights and groups
        self._warned_for: tuple[float | None, str] | None = None  # upper and clamp
        self._version = -1  # of the first γ, after the last step
        self._moved = 0  # steps in a row before which it had changed since

    @staticmethod
    def of(scales: ScalingFactors) -> Binding:
        """The binding of `scales`, made once and kept with them, whichever thread is first."""
        if scales._binding is None:
            with _MAKING:
                if scales._binding is None:
                    scales._binding = Binding(scales)
        found: Binding = scales._binding
        return found

    def require_gradient(self) -> None:
        """Raise StepError unless some γ has a gradient."""
        if any(param.requires_grad and param.grad is not None for param in self.params):
            return
        if not any(param.requires_grad for param in self.params):
            raise StepError(
                f"all {len(self.params)} scaling factors are frozen (requires_grad=False): "
                "nothing can be regularized; unfreeze them or call optimizer.step()"
            )
        raise StepError(
            f"no scaling factor has a gradient (first: {self.names[0]!r}): call backward() before "
            "the step; if you did, these scaling factors are not of the network that trains: of a "
            "copy of it (an average, a deepcopy), of the one before pf.shrink (then step with what "
            "reg.follow returned), or its parameters were replaced since, as fully_shard does (then"
            f" scales.rebind(model)){lost_gates(self.names)}"
        )

    def check_members(self, optimizer: Optimizer) -> None:
        """Find each trainable γ in the optimizer, unless nothing changed since the last time.

        Raises:
            ScalingFactorError: a trainable γ is in no parameter group.
        """
        if self._roster.same(optimizer.param_groups):
            return
        groups = [group["params"] for group in optimizer.param_groups]
        group_of = {id(param): i for i, params in enumerate(groups) for param in params}
        for name, param in zip(self.names, self.params, strict=True):
            if param.requires_grad and id(param) not in group_of:
                raise ScalingFactorError(
                    f"{name!r} requires a gradient but is in no parameter group of this "
                    f"{type(optimizer).__name__}: build the optimizer from model.parameters() "
                    "after the model is complete, add_param_group it, or freeze it; if the model's "
                    "parameters were replaced (fully_shard), take scales.rebind(model); if pf.slim "
                    "or pf.shrink has given the optimizer another network, call handle.remove() "
                    "before, and step with that one's scaling factors or with optimizer.step()"
                    f"{lost_gates(self.names)}"
                )
        self._check_present()
        self.trainable = [param for param in self.params if param.requires_grad]
        self.frozen = [param for param in self.params if not param.requires_grad]
        self.groups = sorted({group_of[id(param)] for param in self.trainable})
        ours = {id(param) for param in self.params}
        self.others = [
            (i, [param for param in groups[i] if id(param) not in ours])
            for i in sorted({group_of[key] for key in ours if key in group_of})
        ]
        self._roster.remember(optimizer.param_groups)

    def _check_present(self) -> None:
        """Raise StepError for γ that the network they were found in has lost."""
        model = None if self._model is None else self._model()
        if model is None:
            return
        present = {id(param) for param in model.parameters()}
        gone = [n for n, p in zip(self.names, self.params, strict=True) if id(p) not in present]
        if gone:
            raise StepError(
                f"{len(gone)} of {len(self.names)} scaling factors are no parameters of the network"
                f" any more, so that no step reaches it: {', '.join(map(repr, gone[:4]))}. Their "
                "parameters were replaced: take scales.rebind(model), then make the optimizer"
                f"{lost_gates(self.names)}"
            )

    @property
    def last(self) -> Regularizer | None:
        return None if self._last is None else self._last()

    def note_step(self, reg: Regularizer, group: Mapping[str, Any]) -> None:
        """Count a step of a parameter group."""
        if self.last is not reg:
            self._last = weakref.ref(reg)
        lr = group["lr"]
        if self.drift is None or isinstance(lr, Tensor) or "betas" in group or "eps" in group:
            self.drift = None
        else:
            self.drift += reg.lam * (reg.t + 1.0) * lr / (1.0 - group.get("momentum", 0.0))

    def table(self, reg: Regularizer | None) -> Table:
        """The address table of all γ, with the layer weights of `reg` if they matter."""
        first = self.params[0]
        for table in (self._table,) if reg is not None else (self._table, self._looked_at):
            if table is not None and (table.device, table.dtype) == (first.device, first.dtype):
                weights, groups = self._table_from
                if reg is None or (reg.weights is weights and reg.groups is groups):
                    return table
        # New, or moved by model.to(...), or of other weights. What else changes, a table notices.
        weights = None if reg is None else reg.weights_of(self.names)
        tilts = None if reg is None else reg.tilts_of(self.names)
        made = table_of(self.names, self.params, weights, tilts)
        if reg is None:  # thresholds, from whatever thread, leave a step its table
            self._looked_at = made
        else:
            self._table, self._table_from = made, (reg.weights, reg.groups)
        return made

    def warn_if_stepped_twice(self) -> None:
        """Say once that γ move between steps, too, before one of them."""
        if self._moved == STEPS_TOO_MANY:
            return
        self._moved = self._moved + 1 if 0 <= self._version < self.params[0]._version else 0
        if self._moved == STEPS_TOO_MANY and _is_first_process():
            warnings.warn(
                f"something changed {self.names[0]!r} before each of the last {STEPS_TOO_MANY} "
                "pf.step calls: if it is optimizer.step(), every step is taken twice. pf.step "
                "stands in its place: call pf.step alone",
                stacklevel=2,
            )

    def note_end(self) -> None:
        """Note that a step is done."""
        self._version = self.params[0]._version

    def warn_before_clamp(self, reg: Regularizer) -> None:
        """Say once what the first clamp will cut off: γ learned without a clamp can be anywhere."""
        wanted = (reg.upper, reg.clamp)
        if reg.upper is None or wanted == self._warned_for:
            return
        if is_capturing():
            return  # counting needs a synchronization
        self._warned_for = wanted
        clamped = dict(zip(self.names, self.params, strict=True))
        if reg.clamp == "all":
            clamped |= self._others
        outside = {name: _outside(p, reg.upper) for name, p in clamped.items() if p.requires_grad}
        outside = {name: count for name, count in outside.items() if count}
        if outside and _is_first_process():  # all have counted: that may be collective
            warnings.warn(_first_clamp(outside, tuple(clamped), reg.upper), stacklevel=2)


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph and does not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _first_clamp(outside: Mapping[str, int], clamped: Sequence[str], upper: float) -> str:
    """What the first clamp cuts off, for people: how many values by name."""
    shown = ", ".join(f"{name} ({count})" for name, count in list(outside.items())[:4])
    more = f" and {len(outside) - 4} more" if len(outside) > 4 else ""
    gates = [is_gate(name) for name in clamped]
    if all(gates):
        what, advice = "gates", "raise upper=, or start from gates of 1 (pf.init_scales)"
    else:
        what = "scaling factors" if any(gates) else "BatchNorm weights"
        advice = (
            "put gates behind these layers (pf.add_gates), raise upper=, or train from scratch "
            "after pf.init_scales"
        )
    return (
        f"{sum(outside.values())} values in {len(outside)} of {len(clamped)} {what} lie outside "
        f"[0, {upper:g}] and are clamped from now on: {shown}{more}. What a trained network has "
        f"learned there is lost: {advice}"
    )


def _is_first_process() -> bool:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return not ready or distributed.get_rank() == 0


def _check_sizes(scales: ScalingFactors) -> None:
    """Raise ScalingFactorError for a γ that is a piece of what was traced: its mean is another."""
    for name, param in scales.items():
        if param.numel() != scales._sizes[name]:
            raise ScalingFactorError(
                f"{name!r} has {param.numel()} elements and had {scales._sizes[name]} when it was "
                "found: something keeps only a piece of it here (FullyShardedDataParallel does); "
                "use torch.distributed.fsdp.fully_shard and scales.rebind(model)"
            )


def _outside(param: Tensor, upper: float) -> int:
    values = whole({"": param.detach()})[""]
    return int(((values < 0) | (values > upper)).sum())
