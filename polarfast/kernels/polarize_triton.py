"""Polarization step on a GPU: subgradient, clamp, and both fused with SGD, over all γ at once.

Launches: one for the global mean of up to FLAT_SIZE factors, three beyond (row sums, row signs,
update); one for what stays within a row. Nothing is copied to the GPU and nothing is waited for, so
a step can be captured in a CUDA graph, where the numbers handed over here stay as they were.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import polarize_triton_kernels as kernels
from .device_table import DeviceTable
from .triton_common import (
    FIRST_STEP,
    MOMENTUM,
    NESTEROV,
    ROW_BLOCK_SIZE,
    ROW_NUM_WARPS,
    TRITON_DTYPES,
    on_device_of,
)

# The flat kernel: how many factors its one program sums from registers, how many it updates at a
# time, and the warps with which neither spills on any target (tests/test_triton_compile.py).
FLAT_SIZE = 8192
FLAT_BLOCK_SIZE = 2048
FLAT_NUM_WARPS = 16


class SgdScalars(NamedTuple):
    """Arguments of the SGD update in the kernels' order; the defaults where there is no update."""

    lr: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    direction: float = 1.0
    lower: float = float("-inf")
    upper: float = float("inf")
    flags: int = 0


def _launch(
    table: DeviceTable,
    kind: int,
    lam: float,
    t: float,
    per_layer: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    sgd: SgdScalars | None,
) -> None:
    rows = table.sizes.numel()
    if table.numel == 0:
        return
    dtype = TRITON_DTYPES[table.dtype]
    scalars = (grad_scale, found_inf, rows, table.numel, lam, t, *(sgd or SgdScalars()))
    global_mean = kind == kernels.POLARIZATION.value and not per_layer
    with on_device_of(table):
        if global_mean and table.numel <= FLAT_SIZE:
            kernels._polarize_flat_kernel[(1,)](
                table.addresses,
                table.starts,
                table.weights,
                table.row_of,
                *scalars,
                SGD=sgd is not None,
                DTYPE=dtype,
                FLAT_SIZE=FLAT_SIZE,
                BLOCK_SIZE=FLAT_BLOCK_SIZE,
                num_warps=FLAT_NUM_WARPS,
            )
            return
        row_table = (table.addresses, table.sizes)
        shape = {"DTYPE": dtype, "BLOCK_SIZE": ROW_BLOCK_SIZE, "num_warps": ROW_NUM_WARPS}
        if global_mean:
            kernels._row_sums_kernel[(rows,)](*row_table, table.scratch, **shape)
            kernels._row_signs_kernel[(rows,)](
                *row_table, table.scratch, rows, table.numel, **shape
            )
        kernels._polarize_rows_kernel[(rows,)](
            *row_table,
            table.weights,
            table.scratch,
            *scalars,
            KIND=kind,
            PER_LAYER=per_layer,
            SGD=sgd is not None,
            **shape,
        )


def add_subgradient_(
    table: DeviceTable,
    kind: int,
    lam: float,
    t: float,
    per_layer: bool,
    grad_scale: Tensor | None = None,
) -> None:
    """Add λ·∂R, times `grad_scale` if given, to the gradients of the table's factors."""
    _launch(table, kind, lam, t, per_layer, grad_scale, None, None)


def clamp_(table: DeviceTable, upper: float, found_inf: Tensor | None = None) -> None:
    """Clamp the factors that have a gradient to [0, upper], unless `found_inf` is not 0."""
    if table.numel == 0:
        return
    with on_device_of(table):
        kernels._clamp_kernel[(table.sizes.numel(),)](
            table.addresses,
            table.sizes,
            found_inf,
            table.sizes.numel(),
            upper,
            DTYPE=TRITON_DTYPES[table.dtype],
            BLOCK_SIZE=ROW_BLOCK_SIZE,
            num_warps=ROW_NUM_WARPS,
        )


def sgd_step_(
    table: DeviceTable,
    kind: int,
    lam: float,
    t: float,
    per_layer: bool,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    upper: float | None,
    first_step: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of torch.optim.SGD on loss + λ·R, then the clamp to [0, upper] unless it is None.

    Gradients are divided by `grad_scale` and keep their values; the momentum buffers are updated.
    ∂R is minimized under `maximize` too. Nothing moves where `found_inf` is not 0.
    """
    flags = [(momentum != 0, MOMENTUM), (first_step, FIRST_STEP), (nesterov, NESTEROV)]
    sgd = SgdScalars(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        direction=-1.0 if maximize else 1.0,
        flags=sum(flag.value for is_set, flag in flags if is_set),
    )
    if upper is not None:
        sgd = sgd._replace(lower=0.0, upper=upper)
    _launch(table, kind, lam, t, per_layer, grad_scale, found_inf, sgd)
