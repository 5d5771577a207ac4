"""All Triton kernels: the training step on γ, and valley thresholds; launched by triton_table.py.

Every regularizer is one arithmetic, for element γ_j of row (layer) l with weight w_l:

    ∂R/∂γ_j = a·sgn(γ_j) + b·γ_j + c·sgn(γ_j − m) + k

    L1             a = λ·w_l
    polarization   a = λ·t_l·w_l   c = −λ·w_l   m = mean of γ   k = λ/n·Σ_i w_l(i)·sgn(γ_i − m)
    squared        a = λ·t_l·w_l   b = −2λ·w_l   k = 2λ·w_l·m + 2λ/n·Σ_i w_l(i)·(γ_i − m)
    centered       a = λ·t_l·w_l   c = −λ·w_l   m = the center of row l, given

but for DeepHoyer, whose terms would be almost equal and as large as 1/γ:

    ∂R/∂γ_j = a·sgn(γ_j)·c·((k − b·|γ_j|) − m)

    b = s, a power of two   k = s·max|γ_l|   m = q = Σ y(k − y) / Σ y, with y = s·|γ_l|
    c = 1/(k − q)   a = 2λ·w_l·c·s

with t_l = t + the row's tilt. Where γ count for their weights in the mean, so do they in k, and the
sum of the weights ("mass") stands for n. What comes from the mean's own derivative is left out of k
where the mean is not differentiated through.

Sums and comparisons with the mean are float64, the rest float32 (float64 for float64 γ). A program
adds in a fixed order and there are no atomics, so results repeat bit for bit. γ reach a kernel
through a table of addresses, so that no list of tensors is handed over; every number that may
change in training is a run-time argument, so that nothing is compiled anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table
from .table import Kind

# Triton kernels take blocks, pointers and scalars, for which Python has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs


POLARIZATION = tl.constexpr(Kind.POLARIZATION.value)
DEEPHOYER = tl.constexpr(Kind.DEEPHOYER.value)
CENTERED = tl.constexpr(Kind.CENTERED.value)
SQUARED = tl.constexpr(Kind.SQUARED.value)

# Bits of the SGD kernels' argument `flags`.
MOMENTUM = tl.constexpr(1)
FIRST_STEP = tl.constexpr(2)
NESTEROV = tl.constexpr(4)

# Compiled once for all their values, 1 and multiples of 16 included.
_RUNTIME_INTEGERS = ["rows", "n", "flags"]
# GradScaler makes these anew now and then, wherever there is room.
_ANY_ALIGNMENT = ["grad_scale_ptr", "found_inf_ptr"]


# --- parts of kernels


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
def row_spread(address, size, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(s, k, q) of one row, as at the head of this file."""
    most = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        y = tl.abs(load_scales(address, offsets, offsets < size, DTYPE).to(tl.float64))
        most = tl.where(y > most, y, most)
    top = tl.max(most, axis=0)
    # 2^±600 where the squares of float64 γ would leave the range of float64.
    scale = tl.where(top > 2.0**340, 2.0**-600, 1.0).to(tl.float64)
    scale = tl.where(top < 2.0**-340, 2.0**600, scale)
    top *= scale
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    spread = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        y = tl.abs(load_scales(address, offsets, offsets < size, DTYPE).to(tl.float64)) * scale
        total += y
        spread += y * (top - y)
    sum_of_all = tl.sum(total, axis=0)
    # A row of zeros has no direction: q = 0 leaves it where it is.
    return scale, top, tl.sum(spread, axis=0) / tl.where(sum_of_all == 0.0, 1.0, sum_of_all)


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


@triton.jit
def mean_of_rows(
    sums_ptr, weights_ptr, rows, mass, WEIGHTED: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The mean of all γ from the sums of the rows."""
    if WEIGHTED:
        return sum_over_rows(sums_ptr, weights_ptr, rows, BLOCK_SIZE) / mass
    else:
        return sum_over_rows(sums_ptr, None, rows, BLOCK_SIZE) / mass


@triton.jit
def _penalty_gradient(gamma, a, b, c, k, mean, KIND: tl.constexpr):
    """The arithmetic at the head of this file; a term that `KIND` lacks is left out (0 · inf)."""
    if KIND == DEEPHOYER:
        wide = gamma.to(tl.float64)
        away = (k - b * tl.abs(wide)) - mean
        size = tl.where((away == 0.0) | (wide == 0.0), 0.0, a * (c * away))  # 0 · inf again
        gradient = tl.where(wide < 0.0, -size, size).to(gamma.dtype)
    else:
        gradient = a.to(gamma.dtype) * sign_around(gamma, 0.0).to(gamma.dtype)
        if KIND == POLARIZATION:
            side = sign_around(gamma.to(tl.float64), mean).to(gamma.dtype)
            gradient += c.to(gamma.dtype) * side + k.to(gamma.dtype)
        elif KIND == CENTERED:
            gradient += c.to(gamma.dtype) * sign_around(gamma.to(tl.float64), mean).to(gamma.dtype)
        elif KIND == SQUARED:
            gradient += b.to(gamma.dtype) * gamma + k.to(gamma.dtype)
    return gradient


@triton.jit
def _shift(
    weight,
    strength,
    pull,
    mean,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    THROUGH: tl.constexpr,
):
    """k of a row under the mean of all; `pull`: λ/mass·Σ of what all γ do to the mean."""
    shift = strength * 0.0
    if THROUGH:
        if WEIGHTED:
            shift += weight * pull
        else:
            shift += pull
    if KIND == SQUARED:
        shift += 2.0 * strength * mean
    return shift


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


# --- the training step


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
    mass: tl.float64,
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
    WEIGHTED: tl.constexpr,
    THROUGH: tl.constexpr,
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
    weights = tl.load(weights_ptr + row_of, mask=present, other=0.0)
    if WEIGHTED:
        mean = tl.sum(weights * scales, axis=0) / mass
    else:
        mean = tl.sum(scales, axis=0) / mass
    if KIND == SQUARED:
        pull = tl.sum(weights * 2.0 * (scales - mean), axis=0)
    else:
        pull = tl.sum(weights * sign_around(scales, mean), axis=0)
    pull *= lam / mass
    for start in range(0, n, BLOCK_SIZE):
        index = start + tl.arange(0, BLOCK_SIZE)
        mask = index < n
        row = tl.load(row_of_ptr + index, mask=mask, other=0)
        offsets = index - tl.load(starts_ptr + row)
        address = tl.load(addresses_ptr + row)
        grad_address = tl.load(addresses_ptr + rows + row)
        momentum_address = tl.load(addresses_ptr + 2 * rows + row)
        gamma = load_scales(address, offsets, mask, DTYPE)
        weight = tl.load(weights_ptr + row)
        strength = weight * lam
        shift = _shift(weight, strength, pull, mean, KIND, WEIGHTED, THROUGH)
        a = strength * (t + tl.load(weights_ptr + rows + row))
        penalty = _penalty_gradient(gamma, a, -2.0 * strength, -strength, shift, mean, KIND)
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
    addresses_ptr,
    sizes_ptr,
    weights_ptr,
    scratch_ptr,
    rows,
    mass: tl.float64,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Second: scratch[1] = Σ sgn(γ − mean) of each row, or Σ 2(γ − mean); every program forms the
    mean itself.
    """
    row = tl.program_id(0)
    mean = mean_of_rows(scratch_ptr, weights_ptr, rows, mass, WEIGHTED, BLOCK_SIZE)
    size = tl.load(sizes_ptr + row)
    if KIND == SQUARED:
        slopes = 2.0 * (tl.load(scratch_ptr + row) - size * mean)
    else:
        slopes = row_signs(tl.load(addresses_ptr + row), size, mean, DTYPE, BLOCK_SIZE)
    tl.store(scratch_ptr + rows + row, slopes)


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _polarize_rows_kernel(
    addresses_ptr,
    sizes_ptr,
    weights_ptr,
    scratch_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    rows,
    mass: tl.float64,
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
    WEIGHTED: tl.constexpr,
    THROUGH: tl.constexpr,
    SGD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One row a program: its coefficients (the global mean from scratch, which for CENTERED holds
    the centers), then the update.
    """
    row = tl.program_id(0)
    size = tl.load(sizes_ptr + row)
    address = tl.load(addresses_ptr + row)
    grad_address = tl.load(addresses_ptr + rows + row)
    momentum_address = tl.load(addresses_ptr + 2 * rows + row)
    weight = tl.load(weights_ptr + row)
    strength = weight * lam
    tilted = strength * (t + tl.load(weights_ptr + rows + row))
    a = strength
    b = -2.0 * strength
    c = -strength
    mean = strength
    shift = strength
    if KIND == POLARIZATION or KIND == SQUARED:
        a = tilted
        if PER_LAYER:
            mean = row_sum(address, size, DTYPE, BLOCK_SIZE) / size
            pull = strength * 0.0
            if THROUGH and KIND == POLARIZATION:  # the slopes of squares add up to 0
                pull = row_signs(address, size, mean, DTYPE, BLOCK_SIZE) * strength / size
            shift = _shift(weight, strength, pull, mean, KIND, False, THROUGH)
        else:
            mean = mean_of_rows(scratch_ptr, weights_ptr, rows, mass, WEIGHTED, BLOCK_SIZE)
            pull = sum_over_rows(scratch_ptr + rows, weights_ptr, rows, BLOCK_SIZE) * lam / mass
            shift = _shift(weight, strength, pull, mean, KIND, WEIGHTED, THROUGH)
    elif KIND == CENTERED:
        a = tilted
        mean = tl.load(scratch_ptr + row)
    elif KIND == DEEPHOYER:
        b, shift, mean = row_spread(address, size, DTYPE, BLOCK_SIZE)
        middle = shift - mean
        c = 1.0 / tl.where(middle == 0.0, 1.0, middle)
        a = 2.0 * strength * c * b
    for start in range(0, size, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        mask = offsets < size
        gamma = load_scales(address, offsets, mask, DTYPE)
        penalty = _penalty_gradient(gamma, a, b, c, shift, mean, KIND)
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


# --- valley thresholds (Sec. 3.3)

BINS = tl.constexpr(table.BINS)
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
