"""Valley thresholds of all layers on a GPU in one launch (paper, Sec. 3.3)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import valley_ref
from .device_table import DeviceTable
from .triton_common import ROW_BLOCK_SIZE, ROW_NUM_WARPS, TRITON_DTYPES, load_scales, on_device_of

# Triton kernels take blocks, pointers and scalars, for which Python has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs


BINS = tl.constexpr(valley_ref.BINS)
# tl.histogram and tl.arange want a power of two; values that are in no bin are counted in the last.
BINS_PADDED = tl.constexpr(128)


@triton.jit
def _edge(bin):
    """Left edge of a bin as numpy.histogram has it for float32: bin · 0.01 in double, rounded."""
    return (bin.to(tl.float64) * 0.01).to(tl.float32)


@triton.jit
def _bin_of(x, mask):
    """Bin of each float32 value, as numpy.histogram(x, 100, (0, 1)) decides; BINS_PADDED − 1: none.

    The product may be off by one at an edge, so the edges have the last word. The last bin is
    closed on the right.
    """
    inside = mask & (x >= 0.0) & (x <= 1.0)
    x = tl.where(inside, x, 0.0)
    bin = tl.minimum((x * 100.0).to(tl.int32), BINS - 1)
    bin = tl.where(x < _edge(bin), bin - 1, bin)
    bin = tl.where((x >= _edge(bin + 1)) & (bin < BINS - 1), bin + 1, bin)
    return tl.where(inside, bin, BINS_PADDED - 1)


@triton.jit
def _first_valley(counts, bin):
    """The first i with d[i] ≤ 0 ≤ d[i + 1], d = diff(counts); BINS if there is none."""
    next_bin = tl.minimum(bin + 1, BINS_PADDED - 1)
    difference = tl.gather(counts, next_bin, 0) - counts
    falls_then_rises = (difference <= 0) & (tl.gather(difference, next_bin, 0) >= 0)
    return tl.min(tl.where(falls_then_rises & (bin < BINS - 2), bin, BINS), axis=0)


@triton.jit
def _valley_kernel(
    addresses_ptr,
    sizes_ptr,
    summary_ptr,
    counts_ptr,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One row a program: counts, then threshold, then how many factors are above it."""
    row = tl.program_id(0)
    address = tl.load(addresses_ptr + row)
    size = tl.load(sizes_ptr + row)
    counts = tl.zeros([BINS_PADDED], tl.int32)
    finite = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        mask = offsets < size
        gamma = load_scales(address, offsets, mask, DTYPE)
        counts += tl.histogram(_bin_of(gamma.to(tl.float32), mask), BINS_PADDED)
        finite += (mask & (tl.abs(gamma) < float("inf"))).to(tl.int32)
    bin = tl.arange(0, BINS_PADDED)
    tl.store(counts_ptr + row * BINS + bin, counts.to(tl.int64), mask=bin < BINS)
    first = _first_valley(counts, bin)
    threshold = tl.where(first < BINS, _edge(first + 1), float("nan")).to(tl.float64)

    kept = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        mask = offsets < size
        gamma = load_scales(address, offsets, mask, DTYPE).to(tl.float64)
        kept += (mask & ((gamma > threshold) | (first == BINS))).to(tl.int32)
    tl.store(summary_ptr + row * 3, threshold)
    tl.store(summary_ptr + row * 3 + 1, tl.sum(kept, axis=0).to(tl.float64))
    tl.store(summary_ptr + row * 3 + 2, (size - tl.sum(finite, axis=0)).to(tl.float64))


def valley(table: DeviceTable) -> tuple[Tensor, Tensor]:
    """Valley threshold of each row of the table.

    Returns:
        summary: float64 [rows, 3], for each row its threshold (NaN: it has no valley), how many of
            its factors are above the threshold (all, if there is none) and how many are not finite.
        counts: int64 [rows, 100], ``numpy.histogram(γ as float32, bins=100, range=(0, 1))``.

    Both stay on the device of the factors; nothing is waited for.
    """
    rows = table.sizes.numel()
    summary = torch.empty((rows, 3), dtype=torch.float64, device=table.device)
    counts = torch.empty((rows, BINS.value), dtype=torch.int64, device=table.device)
    if rows:
        with on_device_of(table):
            _valley_kernel[(rows,)](
                table.addresses,
                table.sizes,
                summary,
                counts,
                DTYPE=TRITON_DTYPES[table.dtype],
                BLOCK_SIZE=ROW_BLOCK_SIZE,
                num_warps=ROW_NUM_WARPS,
            )
    return summary, counts
