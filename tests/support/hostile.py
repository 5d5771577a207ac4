"""Calls of the ops with arguments that nobody should pass: each is refused, or right.

    python -m support.hostile 20000        (in tests/; the seed is fixed)

Every call begins as a valid one. Then some of its arguments become something else: another shape,
dtype, device or layout, negative or huge indices, sizes that no memory holds, memory shared with
another argument. What the call returns is compared with plain torch; arguments must be as before.
A crash ends the process, which is what `make sanitize` looks for.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import polarfast.kernels  # noqa: F401  registers the ops
from polarfast.errors import PolarfastError
from polarfast.kernels import EagerTable, ScaleTable
from polarfast.kernels.table import Kind, Penalty, SgdStep

from .backends import bits

SEED = 20201028
REFUSALS = (RuntimeError, TypeError, ValueError, MemoryError, IndexError, PolarfastError)
OTHER_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.int32, torch.int64),
    *(torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn),
]
#: More elements than 64-bit processors have addresses for bytes.
NOWHERE = 2**50


class Mismatch(AssertionError):
    """A call that was neither refused nor right."""


# --- what becomes of an argument


def _strided(x: Tensor) -> Tensor:
    wide = x.new_empty((*x.shape[:-1], 2 * x.shape[-1])) if x.dim() else x
    return wide[..., ::2].copy_(x) if x.dim() else x


def _resized(x: Tensor, by: int) -> Tensor:
    return torch.cat([x, x[:1]]) if by > 0 and len(x) else x[: max(len(x) + by, 0)]


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "meta": lambda x: x.to("meta"),
    "dtype": lambda x: x.to(random.choice(OTHER_DTYPES)),
    "strided": _strided,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "longer": lambda x: _resized(x, 1),
    "shorter": lambda x: _resized(x, -1),
    "empty": lambda x: x[:0],
    "nothing inside": lambda x: x.new_empty((*x.shape, 0)),
    "one dimension more": lambda x: x.unsqueeze(random.randint(0, x.dim())),
    "flat": lambda x: x.flatten(),
    "a number": lambda x: x.flatten()[0],
    "one for all": lambda x: x[:1].expand(x.shape),
    "nowhere": lambda x: x.flatten()[:1].expand(NOWHERE),
    "nothing, often": lambda x: x.new_empty(NOWHERE, 0),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "quantized": _quantized,
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "negated": torch._neg_view,
    "conjugated": lambda x: x.to(torch.complex64).conj(),
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "with gradient": lambda x: x.detach().clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x.detach().clone()),
    "negative": lambda x: -x - 1,
    "huge numbers": lambda x: x * 2**40 if not x.dtype.is_floating_point else x * 1e30,
    "not numbers": lambda x: x / 0,
    "all the same": lambda x: torch.full_like(x, x.flatten()[0].item()),
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "int": lambda x: 3,
    "string": lambda x: "x",
}


def changed(given: Any, rng: random.Random) -> tuple[Any, str]:
    """The argument made another, where that can be done to it."""
    name = rng.choice(list(CHANGES))
    if not isinstance(given, Tensor):
        return rng.choice([None, -1, 2**70, float("nan"), float("inf"), "x"]), "no tensor"
    if (
        given.layout == torch.strided
        and not given.is_nested
        and max(given.shape, default=0) >= NOWHERE
    ):
        return given, "as it was"  # torch would count, or list, its elements one by one
    try:
        return CHANGES[name](given), name
    except Exception:
        return given, "as it was"


def spoiled(args: list[Any], rng: random.Random) -> tuple[list[Any], list[str]]:
    """None to three of the arguments changed, or one in the place of another."""
    random.seed(rng.random())
    args, done = list(args), []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        i = rng.randrange(len(args))
        if rng.random() < 0.1:
            args[i] = args[rng.randrange(len(args))]
            done.append(f"{i}: another argument")
        else:
            args[i], what = changed(args[i], rng)
            done.append(f"{i}: {what}")
    return args, done


# --- the ops on tensors


def _size(rng: random.Random) -> int:
    return rng.choice([1, 2, 3, 5, 8, 17, 33])


def _index(count: int, among: int, rng: random.Random) -> Tensor:
    return torch.tensor(rng.sample(range(among), min(count, among)), dtype=torch.int64)


def gather_args(rng: random.Random) -> list[Any]:
    shape = [_size(rng) for _ in range(rng.randint(1, 5))]
    weight = torch.rand(shape)
    out = _index(_size(rng), shape[0], rng) if rng.random() < 0.7 else None
    into = None
    if len(shape) > 1 and rng.random() < 0.7:
        into = _index(_size(rng), shape[1], rng)
    return [weight, out, into]


def gather_wanted(weight: Tensor, out: Tensor | None, into: Tensor | None) -> Tensor:
    """In plain torch; raises for what must be refused."""
    _require_alike(weight, out, into)
    found = weight.resolve_neg().resolve_conj()
    for d, index in enumerate((out, into)):
        if index is None:
            continue
        _require_index(index)
        if index.is_meta:
            found = found.new_empty((*found.shape[:d], len(index), *found.shape[d + 1 :]))
            continue
        index = index.resolve_neg()
        _require(not ((index < 0) | (index >= weight.shape[d])).any(), "out of range")
        found = found[(slice(None),) * d + (index,)]
    return found


def put_back_args(rng: random.Random) -> list[Any]:
    kept, width = _size(rng), 33
    shape = [_size(rng), kept, *(_size(rng) for _ in range(rng.randint(0, 3)))]
    return [torch.rand(shape), _index(kept, width, rng), torch.rand(width)]


def put_back_wanted(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    _require_alike(kept, index, constant)
    _require_index(index)
    _require(kept.dim() >= 2 and constant.dim() == 1, "rank")
    _require(len(index) == kept.shape[1], "another number of places")
    _require(all(x.dtype in (*OTHER_DTYPES[:4],) for x in (kept, constant)), "dtype")
    sizes = (kept.shape[0], len(constant), *kept.shape[2:])
    if kept.is_meta:
        return kept.new_empty(sizes)
    index = index.resolve_neg()
    _require(not ((index < 0) | (index >= len(constant))).any(), "out of range")
    _require(len(index.unique()) == len(index), "a place twice")
    full = constant.to(kept.dtype).view(1, -1, *[1] * (kept.dim() - 2)).expand(sizes).clone()
    full[:, index] = kept.detach()
    return full


def norm_args(rng: random.Random) -> list[Any]:
    kept, index, constant = put_back_args(rng)
    vectors = [torch.rand(kept.shape[1]) for _ in range(4)]
    if rng.random() < 0.3:
        vectors[1] = None  # type: ignore[call-overload]
    return [kept, index, constant, *vectors, 1e-5]


def norm_wanted(
    kept: Tensor,
    index: Tensor,
    constant: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    norm = [x for x in (weight, bias, mean, var) if x is not None]
    _require_alike(kept, *norm)
    _require(all(x.dtype in (*OTHER_DTYPES[:4],) for x in (kept, *norm)), "dtype")
    _require(all(x.shape == kept.shape[1:2] for x in norm), "another number of channels")
    if kept.is_meta:
        return put_back_wanted(kept, index, constant)
    vectors = [None if x is None else x.detach().double() for x in (mean, var, weight, bias)]
    normed = F.batch_norm(kept.detach().double(), *vectors, eps=float(eps))  # type: ignore[arg-type]
    return put_back_wanted(normed.to(kept.dtype), index, constant)


def _require(fact: bool, what: str) -> None:
    if not fact:
        raise ValueError(what)


def _require_index(index: Tensor) -> None:
    _require(index.dim() == 1 and index.dtype == torch.int64, "no index")


def _require_alike(*tensors: Tensor | None) -> None:
    given = [tensor for tensor in tensors if tensor is not None]
    _require(len({tensor.device for tensor in given}) == 1, "several devices")
    for tensor in given:
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        _require(plain and not tensor.is_nested, "not dense")
        _require(tensor.numel() < NOWHERE, "no memory for it")


OPS = {
    "gather_channels": (gather_args, gather_wanted),
    "put_back": (put_back_args, put_back_wanted),
    "put_back_norm": (norm_args, norm_wanted),
}


def call_op(name: str, rng: random.Random) -> str:
    """One call of an op: how it ended."""
    make, wanted = OPS[name]
    args, done = spoiled(make(rng), rng)
    before = [_state(arg) for arg in args]
    told = f"{name}({', '.join(map(_describe, args))}), with {done}"
    try:
        got = getattr(torch.ops.polarfast, name)(*args)
    except REFUSALS:
        return "refused"
    finally:
        if [_state(arg) for arg in args] != before:
            raise Mismatch(f"{told}: an argument is another now")
    try:
        want = wanted(*map(_plain, args))
    except Exception as error:
        if not got.numel() and any(isinstance(x, Tensor) and x.numel() >= NOWHERE for x in args):
            return "right"  # nothing of what no memory holds
        raise Mismatch(f"{told} returned {_describe(got)}, and must be refused: {error}") from error
    if not _same(got, want, exact=name != "put_back_norm"):
        raise Mismatch(f"{told} returned {got}, and {want} is right")
    return "right"


def _same(got: Tensor, want: Tensor, exact: bool) -> bool:
    if (got.shape, got.dtype, got.device) != (want.shape, want.dtype, want.device):
        return False
    if got.is_meta or not got.numel():
        return True
    if exact:
        return bits(got.flatten().repeat(1)) == bits(want.flatten().repeat(1))
    tolerance = 64 * torch.finfo(got.dtype).eps
    unit = float(want.detach().double().abs().nan_to_num(0, 0, 0).max())  # a·x + b may cancel
    return torch.allclose(got, want, tolerance, tolerance * max(unit, 1.0), equal_nan=True)


def _state(arg: Any) -> Any:
    """What must be as before; of what has no memory, nothing."""
    if not isinstance(arg, Tensor) or arg.layout != torch.strided or arg.is_quantized:
        return None
    if arg.dtype == torch.bool and arg.is_neg():
        return None  # which torch cannot read
    if arg.is_meta or arg.is_nested or arg.numel() > 10**6 or arg._is_zerotensor():
        return None
    return bits(arg.resolve_neg().resolve_conj().flatten().repeat(1))


def _plain(arg: Any) -> Any:
    """Zeros without memory in memory: torch's own look-ups by index read it."""
    lazy = isinstance(arg, Tensor) and arg._is_zerotensor()
    return torch.zeros(arg.shape, dtype=arg.dtype) if lazy else arg


def _describe(arg: Any) -> str:
    if not isinstance(arg, Tensor):
        return repr(arg)
    shape = "?" if arg.is_nested else list(arg.shape)
    return f"{arg.dtype} {shape} {arg.layout} on {arg.device}"


# --- the table


def call_table(rng: random.Random) -> str:
    """One table, one step on it: refused with nothing written, or as the table in plain torch."""
    seed = rng.randrange(2**31)
    ends = [_outcome(kind, random.Random(seed)) for kind in (ScaleTable, EagerTable)]
    refused = [isinstance(error, Exception) for error, _ in ends]
    if refused[0] != refused[1]:
        raise Mismatch(f"table of seed {seed}: {[error for error, _ in ends]}")
    if refused[0]:
        return "refused"
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        if not torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise Mismatch(f"table of seed {seed}: {a} and {b}")
    return "right"


def _outcome(kind: Any, rng: random.Random) -> tuple[Any, list[Tensor]]:
    """What a kind of table makes of the calls that this random state stands for."""
    torch.manual_seed(rng.randrange(2**31))
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    params = [torch.nn.Parameter(torch.rand(_size(rng)).to(dtype)) for _ in range(3)]
    state: dict[Any, Any] = {}
    for param in params:
        param.grad = torch.rand_like(param)
        state[param] = {"momentum_buffer": torch.rand_like(param)}
    numbers = [0.1, 1.0, -1.0, 0.0]
    penalty = Penalty(
        rng.choice(list(Kind)),
        rng.choice(numbers),
        rng.choice([0.0, 1.2, -2.0]),
        *(rng.random() < 0.3 for _ in range(3)),
    )
    sgd = SgdStep(0.1, rng.choice([0.0, 0.9]), upper=rng.choice([None, 1.0]))
    weights = [rng.choice([0.0, 1.0, 2.0]) for _ in range(rng.choice([3, 3, 3, 3, 2, 4]))]
    try:
        table = kind([str(i) for i in range(3)], params, weights)
        if rng.random() < 0.2:
            table.centers = [0.5] * rng.choice([2, 3, 4])
        _spoil(params, state, rng)
        before = [bits(x.detach()) for x in params]
        try:
            table.refresh(state)
        except REFUSALS:
            if [bits(x.detach()) for x in params] != before:
                raise Mismatch("a refused refresh wrote") from None
            raise
        if rng.random() < 0.5:
            table.add_subgradient_(penalty)
        given = [x for p in params for x in (p, p.grad, state[p]["momentum_buffer"])]
        wild = any(x is not None and not x.detach().abs().max() < 100 for x in given if len(x))
        table.sgd_step_(penalty, sgd)
        table.clamp_(2.0)
        table.valley()
    except REFUSALS as error:
        return error, []
    # How far overflow spreads depends on the precision of the arithmetic (test_polarize.py).
    return None, [] if wild else [param.detach() for param in params]


def _spoil(params: list[torch.nn.Parameter], state: dict[Any, Any], rng: random.Random) -> None:
    random.seed(rng.random())
    for _ in range(rng.choice([0, 1, 1, 2])):
        param, which = rng.choice(params), rng.randrange(4)
        name = rng.choice([name for name in CHANGES if name != "zeros"])  # plain torch can add them
        try:
            if which == 0:
                param.data = CHANGES[name](param.detach())
            elif which == 1:
                param.grad.data = CHANGES[name](param.grad)  # type: ignore[union-attr]
            elif which == 2:
                param.grad = CHANGES[name](param.grad)
            else:
                state[param] = {"momentum_buffer": CHANGES[name](param.detach())}
        except Exception:
            continue


def main(calls: int, seed: int = SEED) -> Counter[str]:
    """So many calls; how they ended.

    Raises:
        Mismatch: one was neither refused nor right.
    """
    rng, ends = random.Random(seed), Counter[str]()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(calls):
            name = rng.choice([*OPS, "table"])
            end = call_table(rng) if name == "table" else call_op(name, rng)
            ends[f"{name}: {end}"] += 1
    return ends


if __name__ == "__main__":
    found = main(int(sys.argv[1]))
    for how, count in sorted(found.items()):
        print(f"{count:7} {how}")
    print(f"{found.total():7} calls, each refused or right")
