"""Rules for the operators that move, combine and reduce activations, by operator name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..inputs import tensors_in
from ..layers import PUT_BACK_INDEX
from .graph import PIN, along, compact, varying_dims
from .recorder import ParameterView, Recorder, Value, pinned_ids

#: The result has the first argument's shape and channels (operators torch does not tag as
#: pointwise).
SAME = frozenset(
    "clone contiguous alias detach _to_copy lift_fresh hardswish hardsigmoid hardtanh relu6 celu "
    "mish log_sigmoid_forward native_dropout bernoulli empty_like zeros_like ones_like full_like "
    "rand_like randn_like randint_like _conj _neg_view".split()
)
#: Element-by-element operators of several tensors that torch does not tag as pointwise.
POINTWISE = frozenset("prelu _prelu_kernel rsub floor_divide complex polar".split())
#: Movements that keep every channel whole whatever the number of channels: the operator itself, run
#: on the ids.
FREE_MOVES = frozenset(
    "permute transpose t squeeze unsqueeze expand repeat movedim swapaxes".split()
)
#: Per-position operators on (N, C, ...) that leave N and C alone.
SPATIAL = frozenset(
    "max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d grid_sampler_2d grid_sampler_3d".split()
)
#: Operators along one dimension, and where that stands among their arguments: what they return for
#: a channel depends on that channel alone.
LINES = {
    **dict.fromkeys("max min median nanmedian mode sort argmax argmin".split(), 1),
    **dict.fromkeys("cumsum cumprod cummax cummin logcumsumexp".split(), 1),
    **dict.fromkeys("_softmax _log_softmax _safe_softmax".split(), 1),
    **dict.fromkeys("topk kthvalue".split(), 2),
}
#: Those of them that work along the last dimension unless told; the others over everything.
LAST = frozenset("mode sort topk kthvalue".split())
#: Transforms over several dimensions, given as their second argument.
TRANSFORMS = frozenset("_fft_r2c _fft_c2c _fft_c2r".split())
#: Reductions over given dimensions.
REDUCTIONS = frozenset(
    "mean sum nansum prod amax amin aminmax var std var_mean std_mean logsumexp linalg_vector_norm "
    "any all count_nonzero".split()
)
#: Operators whose result does not carry channels: shapes, and new tensors of a size given in
#: numbers.
FORGET = frozenset(
    "new_zeros new_ones new_full new_empty sym_size sym_stride sym_numel is_same_size".split()
)
#: Fewer channels would be given other numbers than they have among all.
DRAWN = "draws random numbers for each channel"
#: Products: a factor 0 in one operand is 0 in the result. Every other combination counts as an
#: addition.
PRODUCTS = frozenset("mul div".split())
REPEATED = "repeated by the number of other channels"


def movement(rec: Recorder, func: Any, args: tuple[Any, ...], out: Any) -> None:
    """Run the operator itself on the ids."""
    name = func.overloadpacket.__name__
    in_place = name.endswith("_")  # then on a copy: ids are shared
    sources: list[Value] = []

    def to_ids(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            value = rec.value(arg)
            if value is None:
                return torch.full((), PIN, device="cpu").expand(arg.shape)
            sources.append(value)
            return value.ids.clone() if in_place else value.ids
        return [to_ids(item) for item in arg] if isinstance(arg, (list, tuple)) else arg

    id_args = [to_ids(arg) for arg in args]
    if name in ("index", "index_select"):  # by the indices themselves
        id_args[1:] = tree_map_only(Tensor, Tensor.cpu, args[1:])
    try:
        ids = func(*id_args)
    except RuntimeError:  # a view of expanded ids that needs real memory
        ids = func(*[arg.contiguous() if isinstance(arg, Tensor) else arg for arg in id_args])
    outs, all_ids = (out, ids) if isinstance(out, (list, tuple)) else ((out,), (ids,))
    for tensor, tensor_ids in zip(outs, all_ids, strict=True):
        rec.put(tensor, tensor_ids, sources)


def join(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Concatenation or stack. Along another dimension than that of their channels, the operands
    must have as many each: these go together, place by place.
    """
    movement(rec, func, args, out)
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    operands = []
    for tensor in args[0]:
        value = rec.value(tensor)
        ids = pinned_ids(tensor) if value is None else value.ids
        if func.overloadpacket.__name__ == "stack":
            ids = ids.unsqueeze(dim)
        if ids.dim() == out.dim():  # torch leaves out what has one dimension and no element
            operands.append(ids)
    if not any(varying_dims(ids) - {dim} for ids in operands):
        return
    label = rec.graph.labels()  # what goes together already does not differ
    across = any(dim in varying_dims(label[compact(ids)]) or not ids.numel() for ids in operands)
    if across and any(varying_dims(label[compact(ids)]) - {dim} for ids in operands):
        for ids in operands:
            rec.pin(ids, "joined along another dimension than that of its channels")
        return
    if across:
        return
    rows = [compact(ids.narrow(dim, 0, 1)) for ids in operands]
    for row in rows[1:]:
        rec.tie(*torch.broadcast_tensors(rows[0], row))


def spatial(rec: Recorder, func: Any, args: tuple[Any, ...], out: Any) -> None:
    """Pooling, resizing, reflection: over as many last dimensions as the name says."""
    value = rec.values[args[0]]
    name = func.overloadpacket.__name__
    space = next(int(char) for char in name if char in "123")
    rank = value.ids.dim()
    others = [other for other in args[1:] if isinstance(other, Tensor)]  # a grid to sample at
    fixed = {*range(rank - space, rank), *([0] if others else [])}  # it has as many samples
    if varying_dims(value.ids) & fixed:
        opaque(rec, func, args, out)
        return
    for other in others:
        if (where := rec.value(other)) is not None:
            rec.pin(where.ids, f"says where {name} reads")
    if not name.startswith(("adaptive_avg", "_adaptive_avg")):
        rec.graph.pooled.append(compact(value.ids).reshape(-1))
    ids = value.ids
    for dim in range(rank - space, rank):
        ids = ids.narrow(dim, 0, 1)
    for result in tensors_in(out):  # indices too
        rec.put(result, ids.expand(result.shape), [value])


def reduction(
    rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Reduce over dimensions along which the channel is the same (a mean over height and width)."""
    value = rec.values[args[0]]
    place = 2 if func.overloadpacket.__name__ == "linalg_vector_norm" else 1
    given = args[place] if len(args) > place else kwargs.get("dim")
    if isinstance(given, int) and not isinstance(given, bool):
        given = [given]
    rank = value.ids.dim()
    dims = (
        sorted({dim % rank for dim in given})
        if isinstance(given, (list, tuple)) and given
        else list(range(rank))
    )
    if set(dims) & varying_dims(value.ids):
        opaque(rec, func, args, out)
        return
    for result in tensors_in(out):
        if any(value.ids.shape[dim] == 0 for dim in dims):  # a sum of nothing is a constant
            rec.put_pinned(result, [value])
            continue
        ids = value.ids
        for dim in dims:
            ids = ids.narrow(dim, 0, 1)
        same_size = ids.numel() == result.numel()
        ids = ids.reshape(result.shape) if same_size else compact(ids).expand(result.shape)
        rec.put(result, ids, [value])


def line(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """An operator along one dimension, or a transform over several, along which the channel is the
    same; the results may be longer or shorter there, or without it.
    """
    value, name = rec.values[args[0]], func.overloadpacket.__name__
    place = LINES.get(name, 1)
    usual = -1 if name in LAST else None
    given = args[place] if len(args) > place else kwargs.get("dim", usual)
    rank = value.ids.dim()
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if not all(type(dim) is int for dim in several):
        opaque(rec, func, (args, kwargs), out)
        return
    dims = {dim % rank for dim in several}
    if dims & varying_dims(value.ids) or 0 in value.ids.shape:
        opaque(rec, func, (args, kwargs), out)
        return
    ids = value.ids
    for dim in dims:
        ids = ids.narrow(dim, 0, 1)
    for result in tensors_in(out):
        kept = ids if result.dim() == rank else ids.squeeze(*dims)
        rec.put(result, kept.expand(result.shape), [value])


def refuse_repeated(rec: Recorder, args: Any) -> None:
    """Pin what is repeated as often as there are other channels, and these: a position would be of
    either.
    """
    for value in filter(None, map(rec.value, tensors_in(args))):
        for row in value.repeated.values():
            rec.pin(torch.cat((row, compact(value.ids).reshape(-1))), REPEATED)


def repeated_for(rec: Recorder, value: Value, ids: Tensor) -> None:
    """A value meets channels `ids`, of the same shape or with more dimensions before: along those
    by whose number it is repeated these must be the ones, else all of them stay.
    """
    for dim, row in value.repeated.items():
        dim += ids.dim() - value.ids.dim()
        line = along(ids, dim) if dim in varying_dims(ids) else None
        if line is None:
            rec.pin(torch.cat((row, compact(value.ids).reshape(-1))), REPEATED)
        else:
            rec.match(line, row, REPEATED)


def gather(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Values at places along a dimension on which the channel is the same."""
    x, dim, index = args[:3]
    value, where = rec.values[x], rec.value(index)
    rank = value.ids.dim()
    varying = varying_dims(value.ids)
    if where is None or dim % rank in varying | varying_dims(where.ids):
        refuse_repeated(rec, args)
        opaque(rec, func, args, out)
        return
    own, other = (each.narrow(dim, 0, 1).expand(out.shape) for each in (value.ids, where.ids))
    if where.repeated and not varying_dims(where.ids):
        rec.pin(where.ids, "says where gather reads")
        repeated_for(rec, where, own)
        rec.put(out, own, [value, where])
        return
    refuse_repeated(rec, args)
    rec.tie(*torch.broadcast_tensors(compact(own), compact(other)))
    rec.put(out, own, [value, where])


def unpool(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Each channel's values put at the places that the same channel's indices say."""
    value, where = rec.values[args[0]], rec.value(args[1])
    space = int(func.overloadpacket.__name__[-2])
    first = value.ids.dim() - space
    if where is None or (varying_dims(value.ids) | varying_dims(where.ids)) - set(range(first)):
        opaque(rec, func, args, out)
        return
    rec.tie(*torch.broadcast_tensors(compact(value.ids), compact(where.ids)))
    rec.graph.pooled.append(compact(value.ids).reshape(-1))
    ids = value.ids
    for dim in range(first, first + space):
        ids = ids.narrow(dim, 0, 1)
    rec.put(out, ids.expand(out.shape), [value, where])


def copy_into(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Channels written over others, which they go together with from here on."""
    into, value = rec.value(args[0]), rec.value(args[1])
    if into is None or value is None or args[0] is not out:
        opaque(rec, func, args, out)
        return
    rec.tie(*torch.broadcast_tensors(into.ids, value.ids))
    rec.put(out, into.ids, [into, value])


def put_back(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Channels at their places among constants, as a slim model's norms put them back: the result
    keeps its width whatever goes of what is put back, whose constants take the empty places.
    """
    into, dim, index, kept = args
    places, value = rec.view(index), rec.value(kept)
    ours = places is not None and places.name.rpartition(".")[2] == PUT_BACK_INDEX
    if not ours or dim != 1 or value is None or rec.value(into) is not None:
        opaque(rec, func, args, out)
        return
    rec.put_pinned(out, [value])


def as_pairs(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Complex numbers as a last dimension of their two parts, and back."""
    value = rec.values[args[0]]
    back = out.dim() < value.ids.dim()
    if back and value.ids.dim() - 1 in varying_dims(value.ids):
        opaque(rec, func, args, out)
        return
    ids = value.ids.select(-1, 0) if back else value.ids.unsqueeze(-1)
    rec.put(out, ids.expand(out.shape), [value])


def gated_half(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """F.glu: the first half of a dimension times a gate made from the second half."""
    value = rec.values[args[0]]
    dim = (args[1] if len(args) > 1 else -1) % value.ids.dim()
    if dim not in varying_dims(value.ids):
        rec.put(out, value.ids.narrow(dim, 0, 1).expand(out.shape), [value])
        return
    first, second = value.ids.chunk(2, dim)
    left, right = (compact(half).contiguous() for half in (first, second))
    ids = rec.multiply(left, right, args[0] not in rec.nonzero, False)
    rec.put(out, ids.expand(out.shape), [value])


#: Operators with a rule of their own.
OTHERS: dict[str, Callable[[Recorder, Any, tuple[Any, ...], Any], None]] = {
    "gather": gather,
    "max_unpool2d": unpool,
    "max_unpool3d": unpool,
    "copy": copy_into,
    "index_copy": put_back,
    "view_as_real": as_pairs,
    "view_as_complex": as_pairs,
    "glu": gated_half,
}


def same(rec: Recorder, args: tuple[Any, ...], out: Any) -> None:
    value = rec.values[args[0]]
    for result in tensors_in(out):
        if result.shape == value.ids.shape:  # not an empty buffer
            rec.put(result, value.ids, [value])
            rec.values[result].repeated = value.repeated


def is_restrided(before: Tensor, out: Tensor) -> bool:
    """Whether as_strided leaves every element at its place, as where torch makes what a global pool
    of a channels_last image returns pass for channels_last again.
    """
    real = [dim for dim, size in enumerate(out.shape) if size > 1]
    strides = [out.stride(dim) for dim in real]
    return out.shape == before.shape and len(real) <= 2 and strides == sorted(strides)[::-1]


def opaque(rec: Recorder, func: Any, args: Any, out: Any) -> None:
    """An operator the tracer does not know: nothing that flows through it can be removed."""
    sources: list[Value] = []
    for tensor in tensors_in(args):
        value = rec.value(tensor)
        if value is not None:
            sources.append(value)
            name = func.overloadpacket.__name__
            drawn = name.startswith("fractional_max_pool")
            why = DRAWN if drawn else "mixes channels or is not known"
            rec.pin(value.ids, f"flows through {name}, which {why}")
        rec.use_whole(tensor)
    for tensor in tensors_in(out) if sources else []:
        rec.put_pinned(tensor, sources)


def written_through(rec: Recorder, view: Tensor) -> None:
    """A view was written: what it is a view of holds activations too, and its size is a fact of the
    code where nothing else is known of it.
    """
    value, base = rec.value(view), view._base
    if value is not None and base is not None and rec.value(base) is None:
        rec.pin(value.ids, "written into a part of a tensor of a fixed size")
        rec.put_pinned(base, [value])


def parameter_view(rec: Recorder, name: str, args: tuple[Any, ...], out: Any) -> bool:
    """Follow a parameter through transposes, reshapes that only insert dimensions, and the product
    with a gate; False if that is not what this is.
    """
    store = next((s for s in (rec.views, rec.functions) if args and _held(s, args[0])), None)
    if store is None or not isinstance(out, Tensor):
        return False
    source: ParameterView = store[args[0]]
    dims, gate = source.dims, source.gate
    if name in ("detach", "alias", "_to_copy", "clone", "contiguous", "lift_fresh"):
        pass
    elif name == "expand":
        first = out.dim() - args[0].dim()
        repeated = [out.shape[first + dim] != size for dim, size in enumerate(args[0].shape)]
        own = [None if again else dim for dim, again in zip(dims, repeated, strict=True)]
        dims = (*[None] * first, *own)
    elif name == "mul" and gate is None and is_gate(rec, args[1]):
        gate = rec.views[args[1]].name
    elif name == "t":
        dims = dims[::-1]
    elif name in ("transpose", "swapaxes"):
        order = list(dims)
        order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
        dims = tuple(order)
    elif name == "permute":
        dims = tuple(dims[dim] for dim in args[1])
    elif name == "select":  # a part, which lies along the parameter's other dimensions
        taken = args[1] % args[0].dim()
        dims, store = (*dims[:taken], *dims[taken + 1 :]), rec.functions
    elif name in ("view", "_unsafe_view", "reshape", "unsqueeze"):
        real = [dim for dim, size in zip(dims, args[0].shape, strict=True) if size > 1]
        if [size for size in out.shape if size > 1] != [size for size in args[0].shape if size > 1]:
            return False
        queue = iter(real)
        dims = tuple(next(queue) if size > 1 else None for size in out.shape)
    else:
        return False
    store[out] = replace(source, dims=dims, gate=gate)
    return True


def parameter_function(rec: Recorder, func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Follow what is computed element by element of one parameter (tanh, exp, times a number) or of
    several that lie alike: without some elements, it lacks just those; False if that is not what
    this is.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    wide = [tensor for tensor in tensors if tensor.numel() > 1]
    if not wide or not isinstance(out, Tensor) or any(each.shape != out.shape for each in wide):
        return False
    by_element = torch.Tag.pointwise in func.tags
    if not by_element or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    sources = []
    for tensor in wide:
        source = rec.functions.get(tensor)
        if source is None and out is not tensor:  # a parameter that is written is no function of it
            source = rec.view(tensor)
        if source is None or source.gate is not None or source.name in rec.gates:
            return False
        sources.append(source)
    if len({source.dims for source in sources}) > 1:
        return False
    for tensor in tensors:
        if tensor.numel() == 1:
            rec.use_whole(tensor)
    names = dict.fromkeys(name for source in sources for name in source.names)
    first, *others = names
    rec.functions[out] = ParameterView(first, sources[0].dims, others=tuple(others))
    return True


def _held(store: Any, tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor in store


def is_gate(rec: Recorder, factor: Any) -> bool:
    """Whether an operand is the gate of a gated module."""
    view = rec.view(factor)
    return view is not None and view.gate is None and view.name in rec.gates


#: Stands for any number that is not 0, nor made 0 by the sums and differences that networks write.
SOME = 0.7310586


def follow_zero(rec: Recorder, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Note whether a result is still 0 where its channels are: an operator that works element by
    element is asked, all others leave 0 at 0.
    """

    def stand_in(tensor: Tensor) -> Tensor:
        zero = rec.value(tensor) is not None and tensor not in rec.nonzero
        return torch.full([1] * tensor.dim(), 0.0 if zero else SOME, device="cpu").to(tensor.dtype)

    asked = torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags
    for result in tensors_in(out):
        if "out" in kwargs:  # which it would write to, and pins what it reads
            zero = False
        elif asked:
            found = func(*tree_map_only(Tensor, stand_in, args), **kwargs)
            zero = not bool(tensors_in(found)[0].any())
        else:
            zero = not any(tensor in rec.nonzero for tensor in tensors_in((args, kwargs)))
        if zero:
            rec.nonzero.pop(result, None)
        else:
            rec.nonzero[result] = True


@dataclass(frozen=True, eq=False)
class Operand:
    """One operand, or several already joined: ids in the result's shape, and the dimensions along
    which it is repeated; whether it is 0 where its channels are.
    """

    ids: Tensor
    repeated: frozenset[int]
    depth: int
    zero: bool

    @property
    def varying(self) -> set[int]:
        return varying_dims(self.ids)


def pointwise(rec: Recorder, name: str, args: tuple[Any, ...], out: Tensor) -> None:
    """`out` carries its operands' channels, which become one where they meet; parameters follow the
    channels they meet.
    """
    if _leaves_out(rec, name, args):
        name = "mul"  # by a mask
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    tracked = [(tensor, value) for tensor in tensors if (value := rec.value(tensor)) is not None]
    joined = _operand(rec, *tracked[0], out)
    for tensor, value in tracked[1:]:
        joined = _join(rec, name, joined, _operand(rec, tensor, value, out))
    for tensor in tensors:
        if rec.value(tensor) is None:
            _constant(rec, name, joined.ids, tensor, out)
    for _, value in tracked:
        repeated_for(rec, value, joined.ids)
    rec.put(out, joined.ids, [value for _, value in tracked])


def _leaves_out(rec: Recorder, name: str, args: tuple[Any, ...]) -> bool:
    """Whether what a mask says becomes 0, and nothing else is done."""
    filled = {"masked_fill": args[2:], "where": args[1:]}.get(name, ())
    return any(_is_zero(rec, operand) for operand in filled)


def _is_zero(rec: Recorder, operand: Any) -> bool:
    if isinstance(operand, Tensor):
        fixed = rec.value(operand) is None and rec.view(operand) is None and not operand.is_meta
        return operand in rec.zeros or (fixed and operand.numel() == 1 and bool(operand == 0))
    return type(operand) in (int, float) and operand == 0


def _operand(rec: Recorder, tensor: Tensor, value: Value, out: Tensor) -> Operand:
    offset = out.dim() - tensor.dim()
    repeated = frozenset(
        d
        for d in range(out.dim())
        if out.shape[d] > 1
        and (d < offset or tensor.shape[d - offset] == 1 or d - offset in value.repeated)
    )
    zero = tensor not in rec.nonzero
    return Operand(value.ids.expand(out.shape), repeated, value.depth, zero)


def _join(rec: Recorder, name: str, left: Operand, right: Operand) -> Operand:
    small = compact(left.ids), compact(right.ids)
    depth, repeated = max(left.depth, right.depth), left.repeated & right.repeated
    both = left.zero and right.zero
    if torch.equal(*small):
        return Operand(left.ids, repeated, depth, both)
    for one, other in ((left, right), (right, left)):
        if other.repeated & one.varying:
            # One value for all channels, e.g. a spatial mask: as a factor it leaves a zero channel
            # zero, added it would not. Its own channel has to stay.
            rec.pin(other.ids, f"is repeated over several channels ({name})")
            if name not in PRODUCTS or other.varying:
                rec.pin(one.ids, f"meets an activation that several of its channels share ({name})")
            return Operand(one.ids, repeated, depth, both)
    one_ids, other_ids = torch.broadcast_tensors(*small)
    if name in PRODUCTS:
        ids = rec.multiply(one_ids, other_ids, left.zero, right.zero and name != "div")
        return Operand(ids.expand(left.ids.shape), repeated, depth, both)
    rec.add(one_ids, other_ids, left.depth, right.depth)
    return Operand(left.ids if left.varying else right.ids, repeated, depth, both)


def _constant(rec: Recorder, name: str, ids: Tensor, tensor: Tensor, out: Tensor) -> None:
    """An operand that is no activation: a parameter follows the channels; any other tensor's size
    is a fact of the code.
    """
    offset = out.dim() - tensor.dim()
    varying = varying_dims(ids)
    view = rec.view_or_function(tensor)
    for d in (d for d in range(tensor.dim()) if tensor.shape[d] > 1 and d + offset in varying):
        line = along(ids, d + offset)
        dim = view.dims[d] if view else None
        if view is None or dim is None or line is None:
            rec.pin(ids, f"combined with a constant tensor of a fixed size ({name})")
            rec.use_whole(tensor)
        else:
            rec.axes(view, dim, line)
