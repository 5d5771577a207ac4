"""Which floating point inputs are no mere data: boxes, coordinates, indices kept as floats."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..inputs import (
    Inputs,
    Operators,
    call_model,
    device_of,
    dtype_of,
    plain_eager,
    tensors_in,
)
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


def divided(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same, which knows whether the network runs on fewer samples."""
    small = None if inputs.divisible else inputs.if_divided()
    if small is None:
        return inputs
    try:
        with as_found(model), plain_eager():
            model.eval()
            for made in small.each(device=device_of(model), dtype=dtype_of(model), seed=0):
                call_model(model, made)
    except Exception:  # as where 8 frames each are one sample: then on all of them
        return inputs
    return replace(inputs, divisible=True)


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
