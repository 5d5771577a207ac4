"""The table on a GPU: the addresses of all γ in its memory, and the launches of Triton kernels.

Launches of a step: one for the global mean of up to FLAT_SIZE factors, three beyond (row sums, row
signs, update); one for what stays within a row. Nothing is copied to the GPU but addresses that
have changed (where gradients are set to None, those of nearly every step), and nothing is waited
for, so a step can be captured in a CUDA graph, where the numbers handed over here stay as they
were.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from . import triton_kernels as kernels
from .scale_table import ScaleTable
from .table import BINS, Kind, Penalty, SgdStep

# One program per row; a row longer than this is walked in blocks. Four factors to a thread: with
# eight, some target spills (tests/kernels/test_triton_compile.py).
ROW_BLOCK_SIZE = 512
ROW_NUM_WARPS = 4
# What the flat kernel updates at a time, and the warps with which it spills on no target.
FLAT_BLOCK_SIZE = 2048
FLAT_NUM_WARPS = 16

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


class _SgdScalars(NamedTuple):
    """Arguments of the SGD update in the kernels' order; the defaults where there is no update."""

    lr: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    direction: float = 1.0
    lower: float = float("-inf")
    upper: float = float("inf")
    flags: int = 0


class _Uploaded(NamedTuple):
    """Addresses on the host (pinned), and their copy on the device: int64 [1 or 3, L]."""

    host: Tensor
    device: Tensor


class TritonTable(ScaleTable):
    """As `ScaleTable`, on a GPU.

    Attributes:
        FLAT_SIZE: how many factors the flat kernel's one program sums from registers.
    """

    FLAT_SIZE: ClassVar[int] = 8192

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        tilts: Sequence[float] | None = None,
    ) -> None:
        # What the device has of a step, and of `valley`: which addresses, sent on which stream.
        self._sent: tuple[int, int] | None = None
        self._addresses: _Uploaded
        self._looked_at: tuple[list[int], int, _Uploaded] | None = None
        self._captured: dict[int, _Uploaded] = {}
        super().__init__(names, params, weights, tilts)
        sizes = torch.tensor(self._numels, dtype=torch.int64, device="cpu")
        rows = torch.arange(len(self.params), dtype=torch.int32, device="cpu")
        self._sizes = self._upload(sizes).device
        self._starts = self._upload(sizes.cumsum(0) - sizes).device  # of each row, among all γ
        each = (self._row_weights, self._tilts)
        weighed = torch.tensor(each, dtype=torch.float64, device="cpu")
        self._weights = self._upload(weighed).device
        self._row_of = self._upload(rows.repeat_interleave(sizes)).device  # of each γ
        # Sums that one launch leaves to the next.
        self._scratch = torch.zeros((2, len(rows)), dtype=torch.float64, device=self.device)
        self._use_centers(self.centers)

    def refresh(self, momentum_of: dict[Any, Any] | None = None) -> int:
        found = super().refresh(momentum_of)
        self._send()
        return found

    def _follow(self) -> None:
        super()._follow()
        self._send()

    def _send(self) -> None:
        """Addresses that have changed, to the device; on another stream than before, all of them,
        as nothing orders that one after the copy.
        """
        wanted = (self._rows.version, self._stream())
        if self._sent != wanted:
            if self._sent is not None:
                self._hold_if_captured(self._addresses)  # nothing is freed in a capture
            host = torch.empty((3, len(self.params)), dtype=torch.int64, device="cpu")
            self._rows.write_addresses(host.data_ptr())
            self._addresses = self._upload(host)
            self._sent = None if self._capturing() else wanted  # a captured copy has not run yet
        self._hold_if_captured(self._addresses)

    def add_subgradient_(self, penalty: Penalty, grad_scale: Tensor | None = None) -> None:
        self._polarize(penalty, None, grad_scale, None)
        increment_version(self._rows.grads())

    def clamp_(self, upper: float, found_inf: Tensor | None = None) -> None:
        self._follow()
        if self.numel:
            with self._on_device():
                kernels._clamp_kernel[(len(self.params),)](
                    self._addresses.device,
                    self._sizes,
                    found_inf,
                    len(self.params),
                    upper,
                    **self._row_shape(),
                )
        increment_version(self._rows.moving())

    def sgd_step_(
        self,
        penalty: Penalty,
        sgd: SgdStep,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        self._check_momentum(sgd)
        self._polarize(penalty, _sgd_scalars(sgd), grad_scale, found_inf)
        increment_version(self._rows.moving())

    def valley(self) -> tuple[Tensor, Tensor]:
        rows = len(self.params)
        summary = torch.empty((rows, 3), dtype=torch.float64, device=self.device)
        counts = torch.empty((rows, BINS), dtype=torch.int64, device=self.device)
        addresses = self._gamma_addresses()
        with self._on_device():
            kernels._valley_kernel[(rows,)](
                addresses, self._sizes, summary, counts, **self._row_shape()
            )
        return summary, counts

    def _use_centers(self, centers: Sequence[float]) -> None:
        numbers = torch.tensor(centers, dtype=torch.float64, device="cpu")
        self._uploaded_centers = self._upload(numbers)

    def _gamma_addresses(self) -> Tensor:
        """On the device, apart from those that a step has read; copied only where they changed."""
        found, stream = self._gammas(), self._stream()
        held = self._looked_at  # read once: another thread may look too
        if held is None or held[:2] != (found, stream):
            sent = self._upload(torch.tensor([found], device="cpu"))
            held = self._looked_at = (found, stream, sent)
        self._hold_if_captured(held[2])
        return held[2].device

    def _polarize(
        self,
        penalty: Penalty,
        sgd: _SgdScalars | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if self.numel == 0:
            return
        kind, lam, t, per_layer, weighted, through = penalty
        rows, addresses = len(self.params), self._addresses.device
        mass = float(self._mass(penalty))
        numbers = (mass, lam, t, *(sgd or _SgdScalars()))
        form = {"KIND": int(kind), "WEIGHTED": weighted, "THROUGH": through}
        global_mean = kind in (Kind.POLARIZATION, Kind.SQUARED) and not per_layer
        with self._on_device():
            if global_mean and self.numel <= self.FLAT_SIZE:
                kernels._polarize_flat_kernel[(1,)](
                    addresses,
                    self._starts,
                    self._weights,
                    self._row_of,
                    grad_scale,
                    found_inf,
                    rows,
                    self.numel,
                    *numbers,
                    **form,
                    SGD=sgd is not None,
                    DTYPE=TRITON_DTYPES[self.dtype],
                    FLAT_SIZE=self.FLAT_SIZE,
                    BLOCK_SIZE=FLAT_BLOCK_SIZE,
                    num_warps=FLAT_NUM_WARPS,
                )
                return
            row_table, shape = (addresses, self._sizes), self._row_shape()
            centered = kind == Kind.CENTERED
            if centered:
                self._hold_if_captured(self._uploaded_centers)
            if global_mean:
                kernels._row_sums_kernel[(rows,)](*row_table, self._scratch, **shape)
                kernels._row_signs_kernel[(rows,)](
                    *row_table,
                    self._weights,
                    self._scratch,
                    rows,
                    mass,
                    KIND=int(kind),
                    WEIGHTED=weighted,
                    **shape,
                )
            kernels._polarize_rows_kernel[(rows,)](
                *row_table,
                self._weights,
                self._uploaded_centers.device if centered else self._scratch,
                grad_scale,
                found_inf,
                rows,
                *numbers,
                **form,
                PER_LAYER=per_layer,
                SGD=sgd is not None,
                **shape,
            )

    def _row_shape(self) -> dict[str, Any]:
        return {
            "DTYPE": TRITON_DTYPES[self.dtype],
            "BLOCK_SIZE": ROW_BLOCK_SIZE,
            "num_warps": ROW_NUM_WARPS,
        }

    def _upload(self, host: Tensor) -> _Uploaded:
        """Copies to the device, without waiting for it."""
        if self.device.type == "cuda":
            host = host.pin_memory()
        return _Uploaded(host, host.to(self.device, non_blocking=True))

    def _hold_if_captured(self, addresses: _Uploaded) -> None:
        """Keeps what a CUDA graph that is being captured will read when it is replayed.

        Its kernels read the addresses of now, filled by the copy from the host if that is in the
        graph too. Later addresses go to new memory; the old memory must stay.
        """
        if self._capturing():
            self._captured[addresses.device.data_ptr()] = addresses

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _stream(self) -> int:
        """The current stream of the device that holds the γ."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, which need not be the one that holds the γ."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _sgd_scalars(sgd: SgdStep) -> _SgdScalars:
    flags = [
        (sgd.momentum != 0, kernels.MOMENTUM),
        (sgd.first_step, kernels.FIRST_STEP),
        (sgd.nesterov, kernels.NESTEROV),
    ]
    return _SgdScalars(
        lr=sgd.lr,
        momentum=sgd.momentum,
        dampening=sgd.dampening,
        weight_decay=sgd.weight_decay,
        direction=-1.0 if sgd.maximize else 1.0,
        lower=float("-inf") if sgd.upper is None else 0.0,
        upper=float("inf") if sgd.upper is None else sgd.upper,
        flags=sum(flag.value for is_set, flag in flags if is_set),
    )
