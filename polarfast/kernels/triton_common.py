"""What the Triton kernels share: sizes, reading through the table of addresses, arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from .device_table import DeviceTable

# Triton kernels take blocks, pointers and scalars, for which Python has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs


# One program per row; a row longer than this is walked in blocks. Four factors to a thread: with
# eight, some target spills (tests/test_triton_compile.py).
ROW_BLOCK_SIZE = 512
ROW_NUM_WARPS = 4

# Bits of the SGD kernels' argument `flags`.
MOMENTUM = tl.constexpr(1)
FIRST_STEP = tl.constexpr(2)
NESTEROV = tl.constexpr(4)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


def on_device_of(table: DeviceTable) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the factors."""
    if table.device.type == "cuda":
        return torch.cuda.device(table.device)
    return nullcontext()


@triton.jit
def load_scales(address, offsets, mask, DTYPE: tl.constexpr):
    """Elements of the tensor at `address` (one, or one for each offset); 0 where masked.

    They come in the precision of all further arithmetic: float64 for float64, else float32.
    """
    values = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0)
    if DTYPE == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@triton.jit
def sign_around(x, pivot):
    """sgn(x − pivot) as an integer, without the subtraction and its rounding; 0 for NaN."""
    return (x > pivot).to(tl.int32) - (x < pivot).to(tl.int32)


@triton.jit
def like(scalar, x):
    """A float64 run-time argument in the precision of `x`, which it would otherwise promote."""
    return tl.full((), scalar, x.dtype)


@triton.jit
def unless_found_inf(grad_address, found_inf_ptr):
    """The address, or 0, as in a frozen row, when GradScaler has found an infinite gradient."""
    if found_inf_ptr is not None:
        grad_address = tl.where(tl.load(found_inf_ptr) == 0.0, grad_address, 0)
    return grad_address


@triton.jit
def clamped(x, lower, upper):
    """x within [lower, upper]; NaN stays NaN, as in torch.clamp_."""
    x = tl.where(x < like(lower, x), like(lower, x), x)
    return tl.where(x > like(upper, x), like(upper, x), x)


@triton.jit
def sgd_update(gamma, gradient, momentum_ptrs, has_momentum, sgd):
    """γ after one step of torch.optim.SGD, in its order; the momentum buffer is written here.

    `sgd` is (lr, momentum, dampening, weight_decay, flags).
    """
    lr, momentum, dampening, weight_decay, flags = sgd
    rate = like(momentum, gamma)
    decay = like(weight_decay, gamma)
    # No decay is no operation: 0 · inf would be NaN.
    step = tl.where(decay != 0.0, gradient + decay * gamma, gradient)
    has_momentum = has_momentum & ((flags & MOMENTUM) != 0)
    first = (flags & FIRST_STEP) != 0
    old = tl.load(momentum_ptrs, mask=has_momentum, other=0.0).to(gamma.dtype)
    buffer = tl.where(first, step, rate * old + like(1.0 - dampening, gamma) * step)
    tl.store(momentum_ptrs, buffer, mask=has_momentum)
    smoothed = tl.where((flags & NESTEROV) != 0, step + rate * buffer, buffer)
    return gamma - like(lr, gamma) * tl.where(has_momentum, smoothed, step)


@triton.jit
def row_sum(address, size, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Σ γ over one row."""
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        total += load_scales(address, offsets, offsets < size, DTYPE).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def row_signs(address, size, mean, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Σ sgn(γ − mean) over one row, a whole number."""
    total = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        mask = offsets < size
        gamma = load_scales(address, offsets, mask, DTYPE).to(tl.float64)
        total += tl.where(mask, sign_around(gamma, mean), 0)
    return tl.sum(total, axis=0).to(tl.float64)


@triton.jit
def row_norms(address, size, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(‖γ‖₁, ‖γ‖₂²) of one row."""
    l1 = tl.zeros([BLOCK_SIZE], tl.float64)
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        gamma = load_scales(address, offsets, offsets < size, DTYPE).to(tl.float64)
        l1 += tl.abs(gamma)
        squares += gamma * gamma
    return tl.sum(l1, axis=0), tl.sum(squares, axis=0)


@triton.jit
def sum_over_rows(values_ptr, weights_ptr, rows, BLOCK_SIZE: tl.constexpr):
    """Σ_l values[l], or Σ_l w_l·values[l] where weights are given."""
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, rows, BLOCK_SIZE):
        row = start + tl.arange(0, BLOCK_SIZE)
        values = tl.load(values_ptr + row, mask=row < rows, other=0.0)
        if weights_ptr is not None:
            values *= tl.load(weights_ptr + row, mask=row < rows, other=0.0)
        total += values
    return tl.sum(total, axis=0)
