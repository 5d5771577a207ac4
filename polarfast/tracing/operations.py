"""What a network runs: every operator that takes time, with the channels in its sizes, so that the
same operator can be timed, and priced, at other widths (`LatencyTable`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..inputs import map_tensors, tensors_in
from .graph import NormCall, ProjectionCall, along, varying_dims
from .recorder import Recorder

#: Where a result lies and of which dtype it is: not part of what an operator does.
_PLACE = ("device", "layout", "pin_memory", "memory_format", "dtype")


@dataclass(frozen=True, eq=False)
class TensorArg:
    """A tensor that an operator was given.

    Attributes:
        shape, dtype, channels_last: of the tensor.
        transposed: a matrix that is stored column by column.
        values: itself, where it holds whole numbers or truth values, which may be indices.
        dim: which of its dimensions channels are along; None: along none, or several.
        ids: of an activation with such a dimension, the id at each index of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    transposed: bool
    values: Tensor | None
    dim: int | None
    ids: Tensor | None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def with_sizes(self, sizes: dict[int, int]) -> "TensorArg":
        """The same with other sizes along some dimensions (negative ones: from the last)."""
        shape = list(self.shape)
        for dim, size in sizes.items():
            shape[dim] = size
        return replace(self, shape=tuple(shape))


@dataclass(frozen=True, eq=False)
class Operation:
    """One operator that ran.

    Attributes:
        func: the operator.
        args, kwargs: what it was given, tensors as `TensorArg`.
        projection: the convolution or linear layer that it computes, with its channels.
        norm: the normalization that it computes.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    projection: ProjectionCall | None
    norm: NormCall | None

    @cached_property
    def key(self) -> str:
        """What operators have in common that take the same time at the same widths, as text."""
        if self.norm is not None:  # an operator of its own on each kind of device
            return json.dumps(["batch_norm", _spelled(self.args[0])])
        kwargs = {name: value for name, value in self.kwargs.items() if name not in _PLACE}
        args = self.args if self.projection is None else self.at_widths(0, 0)
        spelled = [_spelled(args, marked=self.projection is None), _spelled(kwargs)]
        return json.dumps([str(self.func), *spelled, *([self._multiple] if self._multiple else [])])

    @property
    def _multiple(self) -> int:
        """Output channels of each input channel of a depthwise convolution; 0 for others."""
        call = self.projection
        if call is None or not call.depthwise:
            return 0
        return call.outputs.numel() // call.inputs.numel()

    def activations(self) -> list[TensorArg]:
        """Those of its tensors that are activations with channels."""
        return [arg for arg in _tensor_args((self.args, self.kwargs)) if arg.ids is not None]

    def at_widths(self, n_in: int, n_out: int) -> tuple[Any, ...]:
        """The arguments of a projection with so many input and output channels; a depthwise one has
        `n_in`.
        """
        assert self.projection is not None
        name = self.func.overloadpacket.__name__
        if name == "convolution":
            x, weight, bias, *rest = self.args
            if self.projection.depthwise:
                rest[-1] = n_in  # groups
                n_out = n_in * self._multiple
                sizes = {0: n_in if self.projection.transposed else n_out}
            elif self.projection.transposed:
                sizes = {0: n_in, 1: n_out // self.projection.groups}
            else:
                sizes = {0: n_out, 1: n_in // self.projection.groups}
            bias = None if bias is None else bias.with_sizes({0: n_out})
            return (x.with_sizes({1: n_in}), weight.with_sizes(sizes), bias, *rest)
        *bias, x, weight = self.args  # addmm, mm
        biases = [each.with_sizes({-1: n_out}) for each in bias]
        return (*biases, x.with_sizes({1: n_in}), weight.with_sizes({0: n_in, 1: n_out}))

    def share_at(self, share: float) -> float:
        """The share of its activations' elements that `at_share` leaves."""
        full = sum(arg.elements for arg in self.activations())
        left = sum(_narrowed(share, arg).elements for arg in self.activations())
        return left / full if full else 1.0

    def at_share(self, share: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with this share of all channels, at least two where there are as many: one
        would be repeated wherever it meets more.
        """
        narrowed = partial(_narrowed, share)
        return map_args(self.args, narrowed), map_args(self.kwargs, narrowed)


def _narrowed(share: float, arg: TensorArg) -> TensorArg:
    if arg.dim is None:
        return arg
    full = arg.shape[arg.dim]
    return arg.with_sizes({arg.dim: max(min(2, full), round(share * full))})


def note(rec: Recorder, func: Any, args: Any, kwargs: Any, calls: tuple[int, int]) -> None:
    """Note an operator that has run, and whose rule has been applied.

    Args:
        calls: how many projections and norms there were before.
    """
    assert rec.operations is not None
    tensors = tensors_in((args, kwargs))
    if func.is_view or all(rec.value(each) is None for each in tensors):
        return  # no work on activations
    name = func.overloadpacket.__name__
    views = [view for each in tensors if (view := rec.view(each)) is not None]
    if name == "mul" and any(view.name in rec.gates for view in views):
        return  # by a gate, which a slim model does not have
    projections, norms = rec.graph.projections[calls[0] :], rec.graph.norms[calls[1] :]
    product = len(projections) == 1 and name in ("convolution", "addmm", "mm")
    rec.operations.append(
        Operation(
            func,
            map_tensors(tuple(args), lambda tensor: _described(rec, tensor)),
            map_tensors(kwargs, lambda tensor: _described(rec, tensor)),
            projections[0] if product else None,
            norms[0] if len(norms) == 1 and "batch_norm" in name else None,
        )
    )


def _described(rec: Recorder, tensor: Tensor) -> Any:
    value, view = rec.value(tensor), rec.view(tensor)
    dims: set[int] = set()
    if value is not None:
        dims = varying_dims(value.ids)
    elif view is not None:
        places = [i for i, d in enumerate(view.dims) if (view.name, d) in rec.graph.axes]
        dims = set(places)
    (dim,) = dims if len(dims) == 1 else (None,)
    return TensorArg(
        tuple(tensor.shape),
        tensor.dtype,
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last),
        tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous(),
        None if tensor.is_floating_point() else tensor.detach().clone(),
        dim,
        None if dim is None or value is None else along(value.ids, dim),
    )


def map_args(tree: Any, function: Callable[[TensorArg], Any]) -> Any:
    """The same structure, with `function` of each `TensorArg`."""
    if isinstance(tree, TensorArg):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_args(item, function) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [map_args(item, function) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _tensor_args(tree: Any) -> Iterator[TensorArg]:
    if isinstance(tree, TensorArg):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensor_args(tuple(tree.values()))
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensor_args(item)


def _spelled(tree: Any, marked: bool = True) -> Any:
    """Arguments as JSON data; of tensors their shapes, and (`marked`) which dimension is
    channels.
    """
    if isinstance(tree, TensorArg):
        dim = {"channels": tree.dim} if marked else {}
        return {"shape": list(tree.shape), **dim}
    if isinstance(tree, dict):
        return {key: _spelled(item, marked) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [_spelled(item, marked) for item in tree]
    return tree if isinstance(tree, (bool, int, float, str)) or tree is None else str(tree)
