"""What a table of scaling factors does, and the records that it is told in: one for each backend.

All γ of a network, their gradients and momentum buffers are one table, which finds them anew at
each step; what is done to them is done to all at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, ScalingFactorError
from ..sharding import refuse_overlap

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Of the histogram in which valleys are looked for (Sec. 3.3).
BINS = 100


class Kind(IntEnum):
    """Which regularizer: R_s of Eq. 2, Σ|γ|, Σ ‖γ_l‖₁²/‖γ_l‖₂² over the layers; Eq. 2 with a given
    center of each layer in place of the mean, Σ_l Σ_i (t·|γ_i| − |γ_i − c_l|); or Eq. 2 with
    squares, Σ_i (t·|γ_i| − (γ_i − mean)²).
    """

    POLARIZATION = 0
    L1 = 1
    DEEPHOYER = 2
    CENTERED = 3
    SQUARED = 4


class Penalty(NamedTuple):
    """λ·R(γ), as `pf.Regularizer` describes it.

    CENTERED goes by the table's `centers`. The mean is that of all γ, or of each layer
    (`per_layer`), or of all γ with each counting for its layer's weight (`weighted`). `through`: it
    is differentiated through.
    """

    kind: Kind
    lam: float
    t: float = 0.0
    per_layer: bool = False
    weighted: bool = False
    through: bool = True


class SgdStep(NamedTuple):
    """A step of torch.optim.SGD, in its words.

    `upper`: γ end in [0, upper]; None: they are not clamped. `first_step`: the momentum buffers
    hold nothing yet; they are set to the gradient.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    upper: float | None = None
    first_step: bool = False


class Table(ABC):
    """All γ of a network, with their gradients and momentum buffers.

    Call `refresh` before each step: the methods whose names end in `_` work on the gradients and
    buffers that it found. A γ that does not require a gradient, or has none, is frozen: it counts
    in every sum and is never written. Version counters of what is written are bumped.

    Args:
        names: of the γ tensors, for messages.
        params: the γ tensors, all of one dtype (float32, float16, bfloat16 or float64) on one
            device, contiguous.
        weights: layer weight w of each γ tensor; all 1 by default.
        tilts: what is added to t for each γ tensor; all 0 by default.

    Attributes:
        names, params: as given, as tuples.
        dtype, device: of all γ.
        numel: n, the number of γ.
        centers: c_l of each γ tensor, which CENTERED compares its γ with; assign a new sequence to
            change them. 0 at first.

    Raises:
        ArgumentError, ScalingFactorError: a γ cannot be used; the message names it.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        tilts: Sequence[float] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.params = tuple(params)
        self._row_weights = (
            [1.0] * len(self.params) if weights is None else list(map(float, weights))
        )
        self._tilts = [0.0] * len(self.params) if tilts is None else list(map(float, tilts))
        self._check_arguments()
        self.dtype = self.params[0].dtype
        self.device = self.params[0].device
        self._numels = [param.numel() for param in self.params]
        self.numel = sum(self._numels)
        self._centers: Sequence[float] = (0.0,) * len(self.params)

    @property
    def centers(self) -> Sequence[float]:
        return self._centers

    @centers.setter
    def centers(self, value: Sequence[float]) -> None:
        if value is not self._centers:
            if len(value) != len(self.params):
                raise ArgumentError(
                    f"{len(value)} centers for {len(self.params)} scaling factors' layers; give "
                    "one for each"
                )
            self._use_centers(value)
            self._centers = value

    @abstractmethod
    def _use_centers(self, centers: Sequence[float]) -> None:
        """From now on CENTERED goes by these."""

    @abstractmethod
    def refresh(self, momentum_of: dict[Any, Any] | None = None) -> int:
        """Finds γ, gradients and momentum buffers again.

        Args:
            momentum_of: `optimizer.state` of an SGD with momentum, to find each γ's
                "momentum_buffer".

        Returns:
            How many γ tensors have a gradient.

        Raises:
            ScalingFactorError: a γ, its gradient or its buffer cannot be used; the message names
                it and says why.
        """

    @abstractmethod
    def buffered(self) -> int:
        """How many γ that have a gradient have a momentum buffer, as of the last `refresh`."""

    @abstractmethod
    def add_subgradient_(self, penalty: Penalty, grad_scale: Tensor | None = None) -> None:
        """γ.grad += grad_scale · λ · ∂R/∂γ for every γ that has a gradient (eager_table.py)."""

    @abstractmethod
    def clamp_(self, upper: float, found_inf: Tensor | None = None) -> None:
        """γ ← min(max(γ, 0), upper) for every γ that had a gradient at the last `refresh`, wherever
        it is now, unless found_inf is not 0.

        Raises:
            ScalingFactorError: as `refresh`; nothing is written then.
        """

    @abstractmethod
    def sgd_step_(
        self,
        penalty: Penalty,
        sgd: SgdStep,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Subgradient, a step of torch.optim.SGD, and clamp of every γ that has a gradient.

        The gradient is γ.grad / grad_scale, negated under `maximize`, plus λ · ∂R/∂γ (minimized in
        both cases, as SGD's own weight decay is), plus weight_decay · γ. γ.grad is left as it is.
        Nothing moves if found_inf is not 0.

        Raises:
            ScalingFactorError: with momentum, a γ had no momentum buffer at the last `refresh`.
        """

    @abstractmethod
    def valley(self) -> tuple[Tensor, Tensor]:
        """The paper's threshold of each layer (Sec. 3.3) and the histogram that it comes from.

        Looks at the γ of now, and leaves what a step has found as it is, from any thread.

        Returns:
            summary: float64 [L, 3]: threshold (NaN: there is no valley), number of γ above it (all
                if there is none), number of NaN and infinite γ.
            counts: int64 [L, 100]: numpy.histogram(γ as float32, bins=100, range=(0, 1)).
        """

    def _mass(self, penalty: Penalty) -> float:
        """What all γ together count for in the mean of all; 1 where that is nothing."""
        counted = self._row_weights if penalty.weighted else (1.0,) * len(self.params)
        return sum(w * n for w, n in zip(counted, self._numels, strict=True)) or 1.0

    def _check_arguments(self) -> None:
        if not self.params:
            raise ArgumentError("there is no scaling factor at all")
        lengths = [len(each) for each in (self.names, self.params, self._row_weights, self._tilts)]
        if len(set(lengths)) > 1:
            raise ArgumentError(
                "{} names, {} params, {} weights and {} tilts; give one of each for every scaling "
                "factor".format(*lengths)
            )
        first = self.params[0]
        seen: dict[int, str] = {}
        for name, param, weight in zip(self.names, self.params, self._row_weights, strict=True):
            if id(param) in seen:
                raise ArgumentError(f"{name} is the same parameter as {seen[id(param)]}")
            seen[id(param)] = name
            if not math.isfinite(weight):
                raise ArgumentError(f"{name}: its layer weight is {weight}; it must be finite")
            if param.dtype not in DTYPES:
                raise ScalingFactorError(
                    f"{name} is {param.dtype}; a scaling factor must be float32, float16, "
                    "bfloat16 or float64"
                )
            if param.is_meta:
                raise ScalingFactorError(f"{name} has no memory: it is on the meta device")
            if (param.dtype, param.device) != (first.dtype, first.device):
                raise ScalingFactorError(
                    f"{name} is {param.dtype} on {param.device}, but {self.names[0]} is "
                    f"{first.dtype} on {first.device}; all must be of one dtype on one device"
                )
        if all(param.layout == torch.strided for param in self.params):  # else `refresh` refuses
            refuse_overlap(dict(zip(self.names, self.params, strict=True)))

    def _unusable(self, row: int, momentum_of: dict[Any, Any] | None) -> str | None:
        """Why a γ, its gradient or its momentum buffer cannot be used, in words; None: all can."""
        name, param = self.names[row], self.params[row]
        state = {} if momentum_of is None else momentum_of.get(param, {})
        tensors = {
            name: param,
            f"The gradient of {name}": param.grad if param.requires_grad else None,
            f"The momentum buffer of {name}": state.get("momentum_buffer"),
        }
        for what, tensor in tensors.items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                return f"{what} is no tensor but a {type(tensor).__name__}"
            if tensor.layout != torch.strided:
                return f"{what} is sparse ({tensor.layout}); make it dense with .to_dense()"
            if tensor.dtype != self.dtype or tensor.device != self.device:
                return (
                    f"{what} is {tensor.dtype} on {tensor.device}, but {self.dtype} on "
                    f"{self.device} is expected, as when the table was made; make a new table"
                )
            if tensor.numel() != self._numels[row]:
                return f"{what} has {tensor.numel()} elements; expected {self._numels[row]}"
            if not tensor.is_contiguous():
                return f"{what} is not contiguous; make it so with .contiguous()"
            if tensor.is_neg():
                return f"{what} is negated when it is read; make it plain with .resolve_neg()"
        return None

    def _no_momentum(self, row: int) -> ScalingFactorError:
        return ScalingFactorError(
            f"{self.names[row]} has no momentum buffer; make one in the optimizer's state "
            "before refresh(optimizer.state)"
        )
