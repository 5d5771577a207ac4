"""Sizes that a network's code asks for, and what it does with them.

`x.view(b, 2, c // 2, h, w)` follows the number of channels, `x.view(b, 2, 8, h, w)` does not: the
numbers that reach the operator are the same. So while a model is traced, `x.shape` and the like
give whole numbers that remember where they come from, through products and quotients. What the code
computes in another way counts as fixed.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..inputs import tensors_in
from .graph import along, varying_dims
from .recorder import Recorder, Value, spread

#: Ids of an activation, one of its dimensions, and the trace that these ids are of.
Source = tuple[Tensor, int, "weakref.ref[Recorder]"]


class Size(int):
    """A whole number that is proportional to the product of the sizes of some dimensions.

    A plain `int` to everyone else, also when it is copied or pickled.
    """

    sources: tuple[Source, ...]

    @classmethod
    def of(cls, value: int, sources: tuple[Source, ...]) -> "Size":
        size = cls(value)
        size.sources = sources
        return size

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def as_number(self) -> int:
        """Plain, and noted if it counts channels: the network computes with their number."""
        ids = channels_of(self)
        recorder = self.sources[0][2]() if ids is not None else None
        if ids is not None and recorder is not None:
            recorder.graph.numbers.append(ids)
        return int(self)

    def __float__(self) -> float:
        return float(self.as_number())

    # What tensors are computed with, `SizeTracking` is told of by their own operators.

    def __truediv__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, Tensor) else self.as_number() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.as_number()

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return (
            NotImplemented if isinstance(other, Tensor) else pow(self.as_number(), other, modulus)
        )

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        return other ** self.as_number()

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented
        if not isinstance(other, int):
            return self.as_number() * other
        value = int(self) * other
        if isinstance(other, Size):
            return Size.of(value, (*self.sources, *other.sources))
        return Size.of(value, self.sources) if type(other) is int else value

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = int(self) // other
        if not isinstance(other, int) or value * other != int(self):
            return value
        if not isinstance(other, Size):
            return Size.of(value, self.sources)
        left = list(self.sources)
        for source in other.sources:
            found = next((i for i, own in enumerate(left) if _same(own, source)), None)
            if found is None:
                return value
            del left[found]
        return Size.of(value, tuple(left))

    def __neg__(self) -> "Size":
        return Size.of(-int(self), self.sources)

    def __add__(self, other: Any) -> Any:
        return self._sum(int(self) + other, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._sum(int(self) - other, other)

    def _sum(self, value: Any, other: Any) -> Any:
        same = (
            isinstance(other, Size)
            and len(self.sources) == len(other.sources)
            and all(map(_same, self.sources, other.sources))
        )
        return Size.of(value, self.sources) if same else value


def _same(one: Source, other: Source) -> bool:
    return one[0] is other[0] and one[1] == other[1]


def channels_of(size: Any) -> Tensor | None:
    """The row of channel ids that a size is proportional to; None where it is fixed."""
    if not isinstance(size, Size):
        return None
    if any((recorder := trace()) is None or recorder.finished for _, _, trace in size.sources):
        return None  # kept by the network since an earlier trace
    varying = [(ids, dim) for ids, dim, _ in size.sources if dim in varying_dims(ids)]
    return along(*varying[0]) if len(varying) == 1 else None


class Kept:
    """In `Recorder.asked`: a dimension that the call leaves as it is, or cuts into so many equal
    pieces.
    """


FIXED = "a reshape to sizes that are fixed in the network's code"


def becomes(rec: Recorder, value: Value, dims: list[int], asked: Any) -> None:
    """Dimensions become one, or stay one, of the size asked for."""
    if asked is Kept or (asked == -1 and not isinstance(asked, Size)):
        return
    row = channels_of(asked)
    if row is None:
        rec.pin(value.ids, FIXED)
        return
    own = _rows(value.ids, dims)
    if own.numel() == row.numel():
        rec.match(own, row, FIXED)
    elif own.unique().equal(row.unique()):
        return  # the same channels, each several times
    else:
        rec.pin(torch.cat((own, row)), FIXED)


def _rows(ids: Tensor, dims: list[int]) -> Tensor:
    """The ids along some dimensions, flat, at the first place of all others."""
    for dim in set(range(ids.dim())) - set(dims):
        ids = ids.narrow(dim, 0, 1)
    for dim in set(dims) - varying_dims(ids):
        ids = ids.narrow(dim, 0, 1)
    return ids.reshape(-1)


class SizeTracking(TorchFunctionMode):
    """Answers a model's questions about sizes with `Size`s, and notes the sizes that it asks for
    itself (`Recorder.asked`) while the operators of that call run.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PADS and (around := _around(*args, **kwargs)) is not None:
            return around
        if func in _DROPOUTS:  # of whole channels: its noise is made by sizes that nothing follows
            return args[0] if args else kwargs["input"]
        if func in _SIZES:
            return self._sizes(func(*args, **kwargs), func, args, kwargs)
        if func in _ASKED:
            with self._asking(_ASKED[func](self.recorder, args, kwargs)):
                out = func(*args, **kwargs)
                if func in _VIEWS and self.recorder.value(out) is None:
                    self._viewed(out)
                return out
        if func in _REPEATS:
            out = func(*args, **kwargs)
            tensors, outs, sizes = _REPEATS[func](self.recorder, args, kwargs, out)
            for tensor, result in zip(tensors, outs, strict=True):
                self._repeated(tensor, result, sizes)
            return out
        if func in _CONVOLUTIONS:
            self.recorder.groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
            try:
                return func(*args, **kwargs)
            finally:
                self.recorder.groups = 1
        if func in _MAKERS:
            out = func(*args, **kwargs)
            self._made(out, _sizes_given(args, kwargs))
            return out
        for size in _numbers((args, kwargs)):
            if (row := channels_of(size)) is not None:
                self.recorder.pin(row, f"their number is an argument of {func.__name__}")
        return func(*args, **kwargs)

    def _made(self, out: Tensor, sizes: Sequence[Any]) -> None:
        """A new tensor that has as many places along a dimension as an activation has channels has
        one for each of them.
        """
        recorder = self.recorder
        found = ((dim, channels_of(size)) for dim, size in enumerate(sizes))
        rows = {dim: row for dim, row in found if row is not None}
        if len(rows) == 1:
            ((dim, row),) = rows.items()
            if dim < out.dim() and row.numel() == out.shape[dim]:
                ids = spread(row, out.shape, dim)
                recorder.values[out] = recorder.start(ids, recorder.node([]))
                return
        for row in rows.values():
            recorder.pin(row, "a new tensor is made by their number, not with one place for each")

    def _viewed(self, out: Tensor) -> None:
        """A parameter or constant that was given a shape by the number of channels: it has as many
        places as these.
        """
        view = self.recorder.view(out)
        for dim, size in enumerate(self.recorder.asked or ()):
            if (row := channels_of(size)) is None:
                continue
            own = view.dims[dim] if view else None
            if view is None or own is None or row.numel() != out.shape[dim]:
                self.recorder.pin(row, FIXED)
            else:
                self.recorder.axis(view.name, own, row)

    def _repeated(self, tensor: Tensor, out: Tensor, sizes: Sequence[Any]) -> None:
        """A tensor that was brought to these sizes by repeating it (or, back, by sums)."""
        recorder, value = self.recorder, self.recorder.value(tensor)
        first = len(sizes) - tensor.dim()
        grown = [1] * len(sizes)
        for dim, size in enumerate(sizes):
            own = dim - first
            if own < 0 or tensor.shape[own] != out.shape[dim] or tensor.shape[own] == 1:
                grown[dim] = size
            elif value is not None:
                if own in varying_dims(value.ids):
                    becomes(recorder, value, [own], size)
                elif (row := channels_of(size)) is not None:
                    recorder.pin(row, FIXED)
            else:
                self._parameter_stays(out, dim, size)
        if value is None:
            self._made(out, grown)
            return
        rows = ((dim, channels_of(size)) for dim, size in enumerate(grown))
        repeated = {dim: row for dim, row in rows if row is not None}
        if repeated:
            recorder.values[out].repeated = repeated

    def _parameter_stays(self, out: Tensor, dim: int, size: Any) -> None:
        """A parameter, or a constant, that is repeated along others of its dimensions must have
        this size along this one.
        """
        recorder, row = self.recorder, channels_of(size)
        view = recorder.view_or_function(out)
        own = view.dims[dim] if view else None
        if view is not None and own is not None and row is not None:
            if row.numel() == out.shape[dim]:
                recorder.axes(view, own, row)
                return
        if row is not None:
            recorder.pin(row, FIXED)
        elif size is not Kept and size != -1:
            recorder.use_whole(out)

    @contextmanager
    def _asking(self, sizes: list[Any] | None) -> Iterator[None]:
        self.recorder.asked = sizes
        try:
            yield
        finally:
            self.recorder.asked = None

    def _sizes(self, out: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        value = self.recorder.value(tensor)
        if value is None:
            return out
        trace = weakref.ref(self.recorder)
        sources = [(value.ids, dim, trace) for dim in range(tensor.dim())]
        if isinstance(out, torch.Size):
            pairs = zip(out, sources, strict=True)
            return torch.Size([Size.of(size, (source,)) for size, source in pairs])
        if func in _COUNTS:
            return Size.of(out, tuple(sources))
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return Size.of(out, (sources[dim],))


def _around(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor | None:
    """Circular padding, which torch writes into a new tensor piece by piece, as concatenations;
    None where something else is asked for.
    """
    if mode != "circular":
        return None
    pairs = [*enumerate(zip(pad[::2], pad[1::2], strict=True), 1)]
    for dim, (before, after) in pairs:  # negative ones cut off first
        size = input.shape[-dim] + min(before, 0) + min(after, 0)
        if max(before, after) > size:
            return None  # torch refuses it
        input = input.narrow(-dim, max(-before, 0), size)
    for dim, (before, after) in pairs:
        size = input.shape[-dim]
        first = [input.narrow(-dim, size - before, before)] if before > 0 else []
        last = [input.narrow(-dim, 0, after)] if after > 0 else []
        input = torch.cat([*first, input, *last], -dim)
    return input


def _shape(recorder: Recorder, tensor: Tensor) -> list[Any]:
    """The sizes of a tensor, as its network's code is told them."""
    value, trace = recorder.value(tensor), weakref.ref(recorder)
    if value is None:
        return list(tensor.shape)
    return [Size.of(size, ((value.ids, dim, trace),)) for dim, size in enumerate(tensor.shape)]


def _sizes_given(args: Any, kwargs: dict[str, Any]) -> Sequence[Any]:
    """Sizes one by one or in a row, without the tensor before them where there is one."""
    if args and isinstance(args[0], Tensor):
        args = args[1:]
    sizes = next((kwargs[name] for name in ("size", "shape") if name in kwargs), args)
    return sizes[0] if len(sizes) and isinstance(sizes[0], Sequence) else sizes


def _of_view(recorder: Recorder, args: Any, kwargs: dict[str, Any]) -> list[Any] | None:
    sizes = list(_sizes_given(args, kwargs))
    return None if any(isinstance(size, torch.dtype) for size in sizes) else sizes


def _of_other(recorder: Recorder, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    return _shape(recorder, args[1] if len(args) > 1 else kwargs["other"])


def _of_unflatten(recorder: Recorder, args: Any, kwargs: dict[str, Any]) -> list[Any] | None:
    return _asked_of_unflatten(*args, **kwargs)


def _asked_of_unflatten(tensor: Tensor, dim: Any, sizes: Any) -> list[Any] | None:
    if not isinstance(dim, int):
        return None
    kept = [Kept] * tensor.dim()
    dim %= tensor.dim()
    return [*kept[:dim], *sizes, *kept[dim + 1 :]]


def _of_cut(recorder: Recorder, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    return list(_numbers((args[1:], kwargs)))


def _of_chunks(recorder: Recorder, args: Any, kwargs: dict[str, Any]) -> list[Any] | None:
    pieces = args[1] if len(args) > 1 else kwargs.get("chunks", kwargs.get("sections"))
    if isinstance(pieces, Size):  # the size of a piece stays, their number does not
        return [Kept, pieces] if channels_of(pieces) is None else None
    return [Kept, pieces] if type(pieces) is int else _of_cut(recorder, args, kwargs)


Asked = Callable[[Recorder, Any, dict[str, Any]], list[Any] | None]
Repeats = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Any]]


def _to_sizes(recorder: Recorder, args: Any, kwargs: dict[str, Any], out: Any) -> Repeats:
    return args[:1] or [kwargs["input"]], [out], _sizes_given(args, kwargs)


def _to_other(recorder: Recorder, args: Any, kwargs: dict[str, Any], out: Any) -> Repeats:
    return args[:1], [out], _of_other(recorder, args, kwargs)


def _times(recorder: Recorder, args: Any, kwargs: dict[str, Any], out: Any) -> Repeats:
    times = [Kept if size == 1 else size for size in _numbers((args[1:], kwargs))]
    return args[:1] or [kwargs["input"]], [out], [Kept] * (out.dim() - len(times)) + times


def _together(recorder: Recorder, args: Any, kwargs: dict[str, Any], out: Any) -> Repeats:
    """All to the sizes of each that has more than one place there, first those with channels."""
    tensors = args if isinstance(args[0], Tensor) else args[0]
    sizes: list[Any] = [1] * out[0].dim()
    for tensor in tensors:
        first = len(sizes) - tensor.dim()
        for dim, size in enumerate(_shape(recorder, tensor), first):
            if size != 1 and (sizes[dim] == 1 or channels_of(size) is not None):
                sizes[dim] = size
    return tensors, out, sizes


def _grid(recorder: Recorder, args: Any, kwargs: dict[str, Any], out: Any) -> Repeats:
    """Each along a dimension of its own, repeated along those of the others."""
    for tensor in tensors_in(args):
        if (value := recorder.value(tensor)) is not None:
            recorder.pin(value.ids, "on a grid with others (meshgrid)")
    return [], [], []


def _numbers(tree: Any) -> Iterator[int]:
    if isinstance(tree, slice):
        tree = (tree.start, tree.stop)
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, int):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _numbers(item)


_PADS = (F.pad, torch._C._nn.pad)
_DROPOUTS = frozenset({F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout})
_COUNTS = frozenset({Tensor.numel, Tensor.nelement, torch.numel})
_SIZES = frozenset({Tensor.shape.__get__, Tensor.size, *_COUNTS})  # type: ignore[attr-defined]
_VIEWS: dict[Any, Asked] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _of_view),
    **dict.fromkeys((Tensor.view_as, Tensor.reshape_as), _of_other),
}
#: How the sizes are found that a call asks for, which the operator's rule goes by.
_ASKED: dict[Any, Asked] = {
    **_VIEWS,
    **dict.fromkeys((Tensor.unflatten, torch.unflatten), _of_unflatten),
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), _of_cut),
    **dict.fromkeys((Tensor.narrow, torch.narrow), _of_cut),
    **dict.fromkeys((Tensor.split, torch.split), _of_cut),
    **dict.fromkeys((Tensor.split_with_sizes, torch.split_with_sizes), _of_cut),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _of_chunks),
    **dict.fromkeys((Tensor.tensor_split, torch.tensor_split), _of_chunks),
}
#: The tensors that a call repeats, what it returns for each, and the sizes that it brings them to.
_REPEATS: dict[Any, Callable[[Recorder, Any, dict[str, Any], Any], Repeats]] = {
    **dict.fromkeys((Tensor.expand, Tensor.broadcast_to, torch.broadcast_to), _to_sizes),
    Tensor.sum_to_size: _to_sizes,
    Tensor.expand_as: _to_other,
    **dict.fromkeys((Tensor.repeat, Tensor.tile, torch.tile), _times),
    torch.broadcast_tensors: _together,
    torch.meshgrid: _grid,
}
_CONVOLUTIONS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
_MAKERS = frozenset(
    {
        *(torch.zeros, torch.ones, torch.full, torch.empty),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty),
    }
)
