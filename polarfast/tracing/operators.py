"""From an executed operator to its rule."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..inputs import tensors_in
from . import projections, reshapes, rules
from .recorder import Recorder
from .rules import pointwise


def record(
    rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Apply the rule for one executed operator; count a matrix product that no rule has counted."""
    followed = len(rec.graph.projections)
    name: str = func.overloadpacket.__name__
    in_place = name.endswith("_") and not name.startswith("__")
    plain = name.rstrip("_") if in_place else name
    if in_place and args and isinstance(args[0], Tensor):
        rec.touched(args[0])
    if plain == "zeros_like":
        rec.zeros[out] = True
    tensors = tensors_in((args, kwargs))
    if any(rec.value(tensor) is not None for tensor in tensors):
        _apply(rec, plain, func, args, kwargs, out)
        if "batch_norm" not in plain and plain not in _RULES:
            rules.follow_zero(rec, func, args, kwargs, out)
        if in_place and args and isinstance(args[0], Tensor):
            rules.written_through(rec, args[0])
    elif not (
        rules.parameter_view(rec, plain, args, out)
        or rules.parameter_function(rec, func, args, out)
    ):
        for tensor in tensors:
            rec.use_whole(tensor)
    if rec.counting and not rec.again and len(rec.graph.projections) == followed:
        rec.graph.fixed_macs += _macs(func, args, kwargs, out)


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Multiply-accumulates of any matrix product, as torch counts them; 0 for other operators."""
    from torch.utils.flop_counter import flop_registry  # imports Triton, where there is one

    flops = flop_registry.get(func.overloadpacket)
    return 0 if flops is None else flops(*args, **kwargs, out_val=out) // 2


def _apply(
    rec: Recorder,
    plain: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> None:
    """Choose among the rules, for an operator that reads an activation."""
    rule = _RULES.get(plain)
    first = isinstance(args[0], Tensor) and rec.value(args[0]) is not None if args else False
    if plain in rules.FORGET:
        return
    by_element = _is_pointwise(plain, func)
    if not (by_element or plain in rules.SAME or plain == "gather"):
        rules.refuse_repeated(rec, (args, kwargs))
    if plain == "mul" and first and rules.is_gate(rec, args[1]):
        rules.refuse_repeated(rec, args)
        projections.gate(rec, args[0], args[1], out)
        return
    if rule is not None:
        rule(rec, args, out)
    elif "batch_norm" in plain and isinstance(out, tuple):
        projections.batch_norm(rec, func._overloadname, args, out)
    elif plain in ("cat", "stack"):
        rules.join(rec, func, args, out)
    elif plain in rules.FREE_MOVES:
        rules.movement(rec, func, args, out)
    elif plain in ("view", "_unsafe_view", "reshape") and first:
        reshapes.view(rec, func, args, out)
    elif plain == "as_strided" and first and rules.is_restrided(rec.values[args[0]].ids, out):
        rules.same(rec, args, out)
    elif plain in reshapes.CUTS and first:
        reshapes.CUTS[plain](rec, func, args, out)
    elif plain in rules.SPATIAL and first:
        rules.spatial(rec, func, args, out)
    elif plain in rules.REDUCTIONS and first:
        rules.reduction(rec, func, args, kwargs, out)
    elif (
        plain in rules.LINES and func._overloadname != "other" or plain in rules.TRANSFORMS
    ) and first:
        rules.line(rec, func, args, kwargs, out)
    elif plain in rules.OTHERS and first:
        rules.OTHERS[plain](rec, func, args, out)
    elif plain in rules.SAME and first:
        rules.same(rec, args, out)
    elif by_element and isinstance(out, Tensor) and "out" not in kwargs:
        pointwise(rec, plain, args, out)
    else:
        rules.opaque(rec, func, (args, kwargs), out)


def _is_pointwise(plain: str, func: Any) -> bool:
    """Whether torch says so, of the operator or (of some it says it only there) of the one that is
    not in place.
    """
    if torch.Tag.pointwise in func.tags or plain in rules.POINTWISE:
        return True
    other = getattr(getattr(torch.ops.aten, plain, None), func._overloadname, None)
    return other is not None and torch.Tag.pointwise in other.tags


_RULES: Mapping[str, Callable[[Recorder, tuple[Any, ...], Any], None]] = {
    "convolution": projections.convolution,
    "addmm": projections.addmm,
    "mm": projections.mm,
}
