"""Triton kernels of the polarization step; polarize_triton.py launches them.

Every regularizer is one arithmetic, for element γ_j of row (layer) l with weight w_l:

    ∂R/∂γ_j = a·sgn(γ_j) + b·γ_j + c·sgn(γ_j − m) + k

    polarization   a = λ·t·w_l   c = −λ·w_l   m = mean of γ   k = λ/n·Σ_i w_l(i)·sgn(γ_i − m)
    L1             a = λ·w_l
    DeepHoyer      a = 2λ·w_l·A/S   b = −2λ·w_l·A²/S²,  with A = ‖γ_l‖₁ and S = ‖γ_l‖₂²

Sums and comparisons with the mean are float64, the rest float32 (float64 for float64 γ). A program
adds in a fixed order and there are no atomics, so results repeat bit for bit. γ reach a kernel
through a table of addresses, so that no list of tensors is handed over; every number that may
change in training is a run-time argument, so that nothing is compiled anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .polarize_ref import KIND_DEEPHOYER, KIND_POLARIZATION
from .triton_common import (
    clamped,
    like,
    load_scales,
    row_norms,
    row_signs,
    row_sum,
    sgd_update,
    sign_around,
    sum_over_rows,
    unless_found_inf,
)

# Triton kernels take blocks, pointers and scalars, for which Python has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs


POLARIZATION = tl.constexpr(KIND_POLARIZATION)
DEEPHOYER = tl.constexpr(KIND_DEEPHOYER)

# Compiled once for all their values, 1 and multiples of 16 included.
_RUNTIME_INTEGERS = ["rows", "n", "flags"]
# GradScaler makes these anew now and then, wherever there is room.
_ANY_ALIGNMENT = ["grad_scale_ptr", "found_inf_ptr"]


@triton.jit
def _penalty_gradient(gamma, a, b, c, k, mean, KIND: tl.constexpr):
    """The arithmetic at the head of this file; a term that `KIND` lacks is left out (0 · inf)."""
    gradient = a.to(gamma.dtype) * sign_around(gamma, 0.0).to(gamma.dtype)
    if KIND == POLARIZATION:
        side = sign_around(gamma.to(tl.float64), mean).to(gamma.dtype)
        gradient += c.to(gamma.dtype) * side + k.to(gamma.dtype)
    elif KIND == DEEPHOYER:
        gradient += b.to(gamma.dtype) * gamma
    return gradient


@triton.jit
def _apply_penalty(
    gamma,
    penalty,
    addresses,
    offsets,
    mask,
    grad_scale_ptr,
    found_inf_ptr,
    direction,
    bounds,
    sgd,
    SGD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add ∂R to the gradients or, with SGD, take the whole step; rows without a gradient stay."""
    address, grad_address, momentum_address = addresses
    moves = mask & (unless_found_inf(grad_address, found_inf_ptr) != 0)
    grad_ptrs = grad_address.to(tl.pointer_type(DTYPE)) + offsets
    gradient = tl.load(grad_ptrs, mask=moves, other=0.0).to(gamma.dtype)
    if SGD:
        if grad_scale_ptr is not None:
            # The reciprocal as GradScaler takes it, so that a power of two divides exactly.
            gradient *= (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(gamma.dtype)
        gradient = gradient * like(direction, gamma) + penalty
        momentum_ptrs = momentum_address.to(tl.pointer_type(DTYPE)) + offsets
        has_momentum = moves & (momentum_address != 0)
        moved = sgd_update(gamma, gradient, momentum_ptrs, has_momentum, sgd)
        moved = clamped(moved, bounds[0], bounds[1])
        tl.store(address.to(tl.pointer_type(DTYPE)) + offsets, moved, mask=moves)
    else:
        if grad_scale_ptr is not None:
            penalty *= tl.load(grad_scale_ptr).to(gamma.dtype)
        tl.store(grad_ptrs, gradient + penalty, mask=moves)


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _polarize_flat_kernel(
    addresses_ptr,
    starts_ptr,
    weights_ptr,
    row_of_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    rows,
    n,
    lam: tl.float64,
    t: tl.float64,
    lr: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    direction: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    flags,
    SGD: tl.constexpr,
    DTYPE: tl.constexpr,
    FLAT_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Polarization with the global mean in one program: both sums from registers, then the update.

    The update walks the factors anew in smaller blocks (they are in the cache by then): three
    addresses beside each factor do not fit into the registers for all of them at once.
    """
    every = tl.arange(0, FLAT_SIZE)
    present = every < n
    row_of = tl.load(row_of_ptr + every, mask=present, other=0)
    positions = every - tl.load(starts_ptr + row_of)
    scales = load_scales(tl.load(addresses_ptr + row_of), positions, present, DTYPE).to(tl.float64)
    mean = tl.sum(scales, axis=0) / n
    weights = tl.load(weights_ptr + row_of, mask=present, other=0.0)
    signs = tl.sum(weights * sign_around(scales, mean), axis=0)
    shift = signs * lam / n
    for start in range(0, n, BLOCK_SIZE):
        index = start + tl.arange(0, BLOCK_SIZE)
        mask = index < n
        row = tl.load(row_of_ptr + index, mask=mask, other=0)
        offsets = index - tl.load(starts_ptr + row)
        address = tl.load(addresses_ptr + row)
        grad_address = tl.load(addresses_ptr + rows + row)
        momentum_address = tl.load(addresses_ptr + 2 * rows + row)
        gamma = load_scales(address, offsets, mask, DTYPE)
        strength = tl.load(weights_ptr + row) * lam
        penalty = _penalty_gradient(gamma, strength * t, 0.0, -strength, shift, mean, POLARIZATION)
        _apply_penalty(
            gamma,
            penalty,
            (address, grad_address, momentum_address),
            offsets,
            mask,
            grad_scale_ptr,
            found_inf_ptr,
            direction,
            (lower, upper),
            (lr, momentum, dampening, weight_decay, flags),
            SGD,
            DTYPE,
        )


@triton.jit
def _row_sums_kernel(
    addresses_ptr, sizes_ptr, scratch_ptr, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """First of three launches: scratch[0] = Σ γ of each row."""
    row = tl.program_id(0)
    total = row_sum(tl.load(addresses_ptr + row), tl.load(sizes_ptr + row), DTYPE, BLOCK_SIZE)
    tl.store(scratch_ptr + row, total)


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def _row_signs_kernel(
    addresses_ptr, sizes_ptr, scratch_ptr, rows, n, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Second: scratch[1] = Σ sgn(γ − mean) of each row; every program forms the mean itself."""
    row = tl.program_id(0)
    mean = sum_over_rows(scratch_ptr, None, rows, BLOCK_SIZE) / n
    address = tl.load(addresses_ptr + row)
    signs = row_signs(address, tl.load(sizes_ptr + row), mean, DTYPE, BLOCK_SIZE)
    tl.store(scratch_ptr + rows + row, signs)


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _polarize_rows_kernel(
    addresses_ptr,
    sizes_ptr,
    weights_ptr,
    scratch_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    rows,
    n,
    lam: tl.float64,
    t: tl.float64,
    lr: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    direction: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    flags,
    KIND: tl.constexpr,
    PER_LAYER: tl.constexpr,
    SGD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One row a program: its coefficients (the global mean from scratch), then the update."""
    row = tl.program_id(0)
    size = tl.load(sizes_ptr + row)
    address = tl.load(addresses_ptr + row)
    grad_address = tl.load(addresses_ptr + rows + row)
    momentum_address = tl.load(addresses_ptr + 2 * rows + row)
    strength = tl.load(weights_ptr + row) * lam
    a = strength
    b = strength
    mean = strength
    shift = strength
    if KIND == POLARIZATION:
        a = strength * t
        if PER_LAYER:
            mean = row_sum(address, size, DTYPE, BLOCK_SIZE) / size
            shift = row_signs(address, size, mean, DTYPE, BLOCK_SIZE) * strength / size
        else:
            mean = sum_over_rows(scratch_ptr, None, rows, BLOCK_SIZE) / n
            shift = sum_over_rows(scratch_ptr + rows, weights_ptr, rows, BLOCK_SIZE) * lam / n
    elif KIND == DEEPHOYER:
        l1, squares = row_norms(address, size, DTYPE, BLOCK_SIZE)
        # A row of zeros has no direction: its numerators are 0, and so are a and b.
        ratio = l1 / tl.where(squares == 0.0, 1.0, squares)
        a = 2.0 * strength * ratio
        b = -2.0 * strength * ratio * ratio
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        mask = offsets < size
        gamma = load_scales(address, offsets, mask, DTYPE)
        penalty = _penalty_gradient(gamma, a, b, -strength, shift, mean, KIND)
        _apply_penalty(
            gamma,
            penalty,
            (address, grad_address, momentum_address),
            offsets,
            mask,
            grad_scale_ptr,
            found_inf_ptr,
            direction,
            (lower, upper),
            (lr, momentum, dampening, weight_decay, flags),
            SGD,
            DTYPE,
        )


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _clamp_kernel(
    addresses_ptr,
    sizes_ptr,
    found_inf_ptr,
    rows,
    upper: tl.float64,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Clamp each row to [0, upper], but for those without a gradient."""
    row = tl.program_id(0)
    address = tl.load(addresses_ptr + row)
    moves = unless_found_inf(tl.load(addresses_ptr + rows + row), found_inf_ptr) != 0
    size = tl.load(sizes_ptr + row)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        mask = moves & (offsets < size)
        gamma = load_scales(address, offsets, mask, DTYPE)
        tl.store(
            address.to(tl.pointer_type(DTYPE)) + offsets, clamped(gamma, 0.0, upper), mask=mask
        )
