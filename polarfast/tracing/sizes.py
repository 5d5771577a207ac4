"""Sizes that a network's code asks for, and what it does with them.

`x.view(b, 2, c // 2, h, w)` follows the number of channels, `x.view(b, 2, 8, h, w)` does not: the
numbers that reach the operator are the same. So while a model is traced, `x.shape` and the like
give whole numbers that remember where they come from, through products and quotients. What the code
computes in another way counts as fixed.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .graph import along, varying_dims
from .recorder import Recorder, spread

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

    def __truediv__(self, other: Any) -> Any:
        return self.as_number() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.as_number()

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(self.as_number(), other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        return other ** self.as_number()

    def __mul__(self, other: Any) -> Any:
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
    if not isinstance(size, Size) or any(trace() is None for _, _, trace in size.sources):
        return None  # or kept by the network since an earlier trace
    varying = [(ids, dim) for ids, dim, _ in size.sources if dim in varying_dims(ids)]
    return along(*varying[0]) if len(varying) == 1 else None


class Kept:
    """In `Recorder.asked`: a dimension that the call leaves as it is, or cuts into so many equal
    pieces.
    """


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
        if func in _SIZES:
            return self._sizes(func(*args, **kwargs), func, args, kwargs)
        if func in _VIEWS and not (len(args) > 1 and isinstance(args[1], torch.dtype)):
            with self._asking(_asked(args, kwargs)):
                return func(*args, **kwargs)
        if func in _UNFLATTENS:
            with self._asking(_asked_of_unflatten(*args, **kwargs)):
                return func(*args, **kwargs)
        if func in _CUTS:
            with self._asking(list(_numbers((args[1:], kwargs)))):
                return func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            self.recorder.groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
            try:
                return func(*args, **kwargs)
            finally:
                self.recorder.groups = 1
        if func in _MAKERS:
            return self._made(func(*args, **kwargs), args, kwargs)
        if func in _CHUNKS:
            pieces = args[1] if len(args) > 1 else kwargs.get("chunks", kwargs.get("sections"))
            asked: list[Any] | None = [Kept, pieces]
            if isinstance(pieces, Size):  # the size of a piece stays, their number does not
                asked = [Kept, pieces] if channels_of(pieces) is None else None
            elif type(pieces) is not int:
                asked = list(_numbers((args[1:], kwargs)))
            with self._asking(asked):
                return func(*args, **kwargs)
        if getattr(func, "__name__", "").strip("_") in _ARITHMETIC:
            for arg in args:
                if isinstance(arg, Size):
                    arg.as_number()
        return func(*args, **kwargs)

    def _made(self, out: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor that has as many places along a dimension as an activation has channels has
        one for each of them.
        """
        if args and isinstance(args[0], Tensor):
            args = args[1:]  # x.new_zeros(...)
        sizes = kwargs.get("size", args)
        if len(sizes) and isinstance(sizes[0], Sequence):
            sizes = sizes[0]
        rows = [channels_of(size) for size in sizes[: out.dim()]]
        following = [dim for dim, row in enumerate(rows) if row is not None]
        if len(following) == 1:
            dim, row = following[0], rows[following[0]]
            if row is not None and row.numel() == out.shape[dim]:
                recorder = self.recorder
                recorder.values[out] = recorder.start(
                    spread(row, out.shape, dim), recorder.node([])
                )
        return out

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


def _asked(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    sizes = kwargs.get("shape", kwargs.get("size", args[1:]))
    if len(sizes) == 1 and isinstance(sizes[0], Sequence):
        sizes = sizes[0]
    return list(sizes)


def _asked_of_unflatten(tensor: Tensor, dim: Any, sizes: Any) -> list[Any] | None:
    if not isinstance(dim, int):
        return None
    kept = [Kept] * tensor.dim()
    dim %= tensor.dim()
    return [*kept[:dim], *sizes, *kept[dim + 1 :]]


def _numbers(tree: Any) -> Iterator[int]:
    if isinstance(tree, slice):
        tree = (tree.start, tree.stop)
    if isinstance(tree, dict):
        tree = tree.values()
    if isinstance(tree, int):
        yield tree
    elif not isinstance(tree, (Tensor, str)) and hasattr(tree, "__iter__"):
        for item in tree:
            yield from _numbers(item)


_COUNTS = frozenset({Tensor.numel, Tensor.nelement, torch.numel})
_SIZES = frozenset({Tensor.shape.__get__, Tensor.size, *_COUNTS})  # type: ignore[attr-defined]
_VIEWS = frozenset({Tensor.view, Tensor.reshape, torch.reshape})
_UNFLATTENS = frozenset({Tensor.unflatten, torch.unflatten})
_CUTS = frozenset(
    {
        Tensor.__getitem__,
        Tensor.narrow,
        Tensor.split,
        Tensor.split_with_sizes,
        torch.narrow,
        torch.split,
        torch.split_with_sizes,
    }
)
_CONVOLUTIONS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
_ARITHMETIC = frozenset(
    "add radd sub rsub mul rmul multiply div rdiv divide truediv rtruediv true_divide pow "
    "rpow".split()
)
_MAKERS = frozenset(
    {
        *(torch.zeros, torch.ones, torch.full),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
    }
)
_CHUNKS = frozenset({Tensor.chunk, Tensor.tensor_split, torch.chunk, torch.tensor_split})
