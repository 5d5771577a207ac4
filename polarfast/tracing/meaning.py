"""Which floating point inputs are no mere data: boxes, coordinates, indices kept as floats."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..inputs import Inputs, device_of, dtype_of, tensors_in, two_of
from ..running import Operators, call_model, plain_eager, tensors_of
from .dryrun import as_found

#: Operators behind which an input is an activation like any other.
PROJECTIONS = frozenset("convolution addmm mm bmm native_batch_norm _native_batch_norm".split())


class _Raw(Operators):
    """Follows each input as far as the first layer, and notes those that are used otherwise than as
    data: by an operator that is not torch's own, or as whole numbers.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.found: set[int] = set()
        self._raw = WeakIdKeyDictionary()
        for number, tensor in enumerate(inputs):
            self._raw[tensor] = {number}

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        raw = set().union(*(self._raw.get(tensor, set()) for tensor in tensors))
        name = func.overloadpacket.__name__
        if not raw or name in PROJECTIONS:
            return out
        results = tensors_in(out)
        whole = any(not each.is_floating_point() and each.dtype != torch.bool for each in results)
        if func.namespace not in ("aten", "prim", "prims") or (whole and name == "_to_copy"):
            self.found |= raw
        for each in results:
            self._raw[each] = raw | self._raw.get(each, set())
        return out


def inputs_of(model: nn.Module, example_inputs: Any) -> Inputs:
    """What to run a network on, which runs on these examples.

    Raises:
        ArgumentError: as `Inputs.of`.
    """
    return divided(model, Inputs.of(example_inputs, partial(meaning, model)))


#: By how much of the largest output may samples differ that were computed beside fewer others.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
#: What a network may raise that takes its samples in groups of a fixed size.
_ANY = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)


def divided(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same, which knows whether the network computes each sample by itself. (Of a sequence or
    an image without a batch, the first places are no samples.)
    """
    small = None if inputs.divisible else inputs.if_divided()
    dtype = dtype_of(model)
    if small is None or dtype not in ROUNDING:
        return inputs
    with as_found(model), plain_eager():
        model.eval()
        for example in range(len(inputs.specs)):
            made = inputs.make(device=device_of(model), dtype=dtype, seed=0, example=example)
            try:
                whole, part = (tensors_of(call_model(model, each)) for each in (made, two_of(made)))
            except _ANY:
                return inputs
            count = next(len(tensor) for tensor in tensors_in(made) if tensor.dim())
            same = len(whole) == len(part) and all(
                _is_beginning(few, all_, count, ROUNDING[dtype])
                for few, all_ in zip(part, whole, strict=True)
            )
            if not same:
                return inputs
    return replace(inputs, divisible=True)


def _is_beginning(few: Tensor, all_: Tensor, count: int, rounding: float) -> bool:
    """Whether an output of two samples is what they are among `count`."""
    if not all_.dim() or len(all_) != count or few.shape != all_[:2].shape:
        return False
    if not few.numel() or not (few.is_floating_point() or few.is_complex()):
        return torch.equal(few, all_[:2])
    return bool((few - all_[:2]).abs().max() <= rounding * all_.abs().max())


def meaning(model: nn.Module, example: Any) -> frozenset[int]:
    """Numbers of the floating point inputs, in order over all tensors, whose values have a meaning.

    A network's only input is always data.
    """
    tensors = tensors_in(example)
    if not any(tensor.is_floating_point() for tensor in tensors) or len(tensors) < 2:
        return frozenset()
    raw = _Raw(tensors)
    with as_found(model), plain_eager(), raw:
        model.eval()
        call_model(model, example)  # copies are made inside, and are as raw
    return frozenset(n for n in raw.found if tensors[n].is_floating_point())
