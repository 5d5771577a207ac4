"""The pointer table: where all γ of a network, their gradients and momentum buffers are in memory.

Handing three lists of 53 tensors to an op costs more than the arithmetic on them. The table keeps
the addresses, reads them again at each step (in C++, csrc/table.cpp), and checks a tensor again
only when its address has changed. C++ and Triton kernels both work from it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _C
from ..errors import ArgumentError, ScalingFactorError
from .device_table import DeviceTable, triton_launchers
from .valley_ref import BINS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ScaleTable:
    """Addresses of all γ and of their gradients and momentum buffers.

    Call `refresh` before each step: the other methods write to the addresses that it found. A γ
    that does not require a gradient, or has none, is frozen: it counts in every sum and is never
    written. Version counters of what is written are bumped.

    Args:
        names: of the γ tensors, for messages.
        params: the γ tensors, all of one dtype (float32, float16, bfloat16 or float64) on one
            device, contiguous.
        weights: layer weight w of each γ tensor; all 1 by default.
        backend: "cpu" (C++) or "triton"; by default what the device calls for.

    Attributes:
        names, params: as given, as tuples.
        dtype, device: of all γ.
        numel: n, the number of γ. `max_size`: of the largest tensor.
        device_table: what the Triton kernels read; None on the CPU.

    Raises:
        ArgumentError, ScalingFactorError: a γ cannot be used; the message names it.
        BuildError: Triton is needed and cannot be imported.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        self.names = tuple(names)
        self.params = tuple(params)
        row_weights = [1.0] * len(self.params) if weights is None else [float(w) for w in weights]
        self._check_arguments(row_weights)
        self.dtype = self.params[0].dtype
        self.device = self.params[0].device
        self._sizes = [param.numel() for param in self.params]
        self.numel = sum(self._sizes)
        self.max_size = max(self._sizes)
        self._rows = _C.ScaleRows(self.params, str(self.dtype), row_weights)
        self.device_table: DeviceTable | None = None
        if (backend or ("cpu" if self.device.type == "cpu" else "triton")) == "triton":
            self._polarize_triton, self._valley_triton = triton_launchers()
            self.device_table = DeviceTable(self._sizes, row_weights, self.dtype, self.device)
        self._uploaded_version = -1
        self.refresh()

    def refresh(self, momentum_of: dict[Any, Any] | None = None) -> int:
        """Reads all addresses again.

        Args:
            momentum_of: `optimizer.state` of an SGD with momentum, to find each γ's
                "momentum_buffer".

        Returns:
            How many γ tensors have a gradient.

        Raises:
            ScalingFactorError: a γ, its gradient or its buffer cannot be used; the message names
                it and says why.
        """
        found = self._rows.refresh(momentum_of)
        if found < 0:
            raise ScalingFactorError(self._explain(-1 - found, momentum_of))
        if self.device_table is not None:
            if self._uploaded_version != self._rows.version:
                self.device_table.set_addresses(self._rows.addresses)
                self._uploaded_version = self._rows.version
            self.device_table.hold_if_captured()
        return found

    def add_subgradient_(
        self,
        kind: int,
        lam: float,
        t: float,
        per_layer: bool,
        grad_scale: Tensor | None = None,
    ) -> None:
        """γ.grad += grad_scale · λ · ∂R/∂γ for every γ that has a gradient (polarize_ref.py)."""
        if self.device_table is not None:
            self._polarize_triton.add_subgradient_(
                self.device_table, kind, lam, t, per_layer, grad_scale
            )
        else:
            self._rows.add_subgradient_(kind, lam, t, per_layer, _value(grad_scale, 1.0))
        increment_version(self._rows.grads())

    def clamp_(self, upper: float, found_inf: Tensor | None = None) -> None:
        """γ ← min(max(γ, 0), upper) for every γ that has a gradient, unless found_inf is not 0."""
        if self.device_table is not None:
            self._polarize_triton.clamp_(self.device_table, upper, found_inf)
        elif _value(found_inf, 0.0) == 0:
            self._rows.clamp_(upper)
        increment_version(self._rows.moving())

    def sgd_step_(
        self,
        kind: int,
        lam: float,
        t: float,
        per_layer: bool,
        *,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        upper: float | None = None,
        first_step: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Subgradient, a step of torch.optim.SGD, and clamp of every γ that has a gradient.

        The gradient is γ.grad / grad_scale, negated under `maximize`, plus λ · ∂R/∂γ (minimized in
        both cases, as SGD's own weight decay is), plus weight_decay · γ. γ.grad is left as it is.
        Nothing moves if found_inf is not 0.

        Args:
            upper: γ end in [0, upper]; None: they are not clamped.
            first_step: the momentum buffers hold nothing yet; they are set to the gradient.

        Raises:
            ScalingFactorError: with momentum, a γ had no momentum buffer at the last `refresh`.
        """
        if momentum != 0 and (row := self._rows.without_momentum()) >= 0:
            raise ScalingFactorError(
                f"{self.names[row]} has no momentum buffer; make one in the optimizer's state "
                "before refresh(optimizer.state)"
            )
        sgd = (lr, momentum, dampening, weight_decay, nesterov, maximize, upper, first_step)
        if self.device_table is not None:
            self._polarize_triton.sgd_step_(
                self.device_table,
                kind,
                lam,
                t,
                per_layer,
                **dict(zip(SGD_OPTIONS, sgd, strict=True)),
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
        elif _value(found_inf, 0.0) == 0:
            self._rows.sgd_step_(kind, lam, t, per_layer, *sgd, _value(grad_scale, 1.0))
        increment_version(self._rows.moving())

    def valley(self) -> tuple[Tensor, Tensor]:
        """Summary, float64 [L, 3], and histograms, int64 [L, 100] (kernels/valley.py)."""
        self.refresh()
        if self.device_table is not None:
            return self._valley_triton.valley(self.device_table)
        summary = torch.empty((len(self.params), 3), dtype=torch.float64)
        counts = torch.empty((len(self.params), BINS), dtype=torch.int64)
        self._rows.valley(summary.data_ptr(), counts.data_ptr())
        return summary, counts

    def _check_arguments(self, weights: Sequence[float]) -> None:
        if not self.params:
            raise ArgumentError("ScaleTable: there is no scaling factor at all")
        if not len(self.names) == len(self.params) == len(weights):
            raise ArgumentError(
                f"ScaleTable: {len(self.names)} names, {len(self.params)} params and "
                f"{len(weights)} weights; give one of each for every scaling factor"
            )
        first = self.params[0]
        seen: dict[int, str] = {}
        for name, param, weight in zip(self.names, self.params, weights, strict=True):
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
            if (param.dtype, param.device) != (first.dtype, first.device):
                raise ScalingFactorError(
                    f"{name} is {param.dtype} on {param.device}, but {self.names[0]} is "
                    f"{first.dtype} on {first.device}; all must be of one dtype on one device"
                )

    def _explain(self, row: int, momentum_of: dict[Any, Any] | None) -> str:
        """Why the C++ side cannot use a row, in words."""
        name, param = self.names[row], self.params[row]
        state = {} if momentum_of is None else momentum_of.get(param, {})
        tensors = {
            name: param,
            f"The gradient of {name}": param.grad,
            f"The momentum buffer of {name}": state.get("momentum_buffer"),
        }
        for what, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.layout != torch.strided:
                return f"{what} is sparse ({tensor.layout}); make it dense with .to_dense()"
            if tensor.dtype != self.dtype or tensor.device != self.device:
                return (
                    f"{what} is {tensor.dtype} on {tensor.device}, but {self.dtype} on "
                    f"{self.device} is expected, as when the table was made; make a new table"
                )
            if tensor.numel() != self._sizes[row]:
                return f"{what} has {tensor.numel()} elements; expected {self._sizes[row]}"
            if not tensor.is_contiguous():
                return f"{what} is not contiguous; make it so with .contiguous()"
        return f"{name}, its gradient or its momentum buffer has no memory (meta or wrapped tensor)"


SGD_OPTIONS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "upper",
    "first_step",
)


def _value(scalar: Tensor | None, otherwise: float) -> float:
    return otherwise if scalar is None else scalar.item()
