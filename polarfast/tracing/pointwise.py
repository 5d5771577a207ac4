"""The rule for operators that work element by element: operands at the same place are the same
channel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ids import along, compact, varying_dims
from .recorder import Recorder, Value
from .rules import PRODUCTS


@dataclass(frozen=True, eq=False)
class Operand:
    """One operand, or several already joined: ids in the result's shape, and the dimensions along
    which it is repeated.
    """

    ids: Tensor
    repeated: frozenset[int]
    depth: int

    @property
    def varying(self) -> set[int]:
        return varying_dims(self.ids)


def pointwise(rec: Recorder, name: str, args: tuple[Any, ...], out: Tensor) -> None:
    """`out` carries its operands' channels, which become one where they meet; parameters follow the
    channels they meet.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    tracked = [(tensor, value) for tensor in tensors if (value := rec.value(tensor)) is not None]
    joined = _operand(*tracked[0], out)
    for tensor, value in tracked[1:]:
        joined = _join(rec, name, joined, _operand(tensor, value, out))
    for tensor in tensors:
        if rec.value(tensor) is None:
            _constant(rec, name, joined.ids, tensor, out)
    rec.put(out, joined.ids, [value for _, value in tracked])


def _operand(tensor: Tensor, value: Value, out: Tensor) -> Operand:
    offset = out.dim() - tensor.dim()
    repeated = frozenset(
        d
        for d in range(out.dim())
        if out.shape[d] > 1 and (d < offset or tensor.shape[d - offset] == 1)
    )
    return Operand(value.ids.expand(out.shape), repeated, value.depth)


def _join(rec: Recorder, name: str, left: Operand, right: Operand) -> Operand:
    small = compact(left.ids), compact(right.ids)
    depth, repeated = max(left.depth, right.depth), left.repeated & right.repeated
    if torch.equal(*small):
        return Operand(left.ids, repeated, depth)
    for one, other in ((left, right), (right, left)):
        if other.repeated & one.varying:
            # One value for all channels, e.g. a spatial mask: as a factor it leaves a zero channel
            # zero, added it would not. Its own channel has to stay.
            rec.pin(other.ids, f"is repeated over several channels ({name})")
            if name not in PRODUCTS or other.varying:
                rec.pin(one.ids, f"meets an activation that several of its channels share ({name})")
            return Operand(one.ids, repeated, depth)
    one_ids, other_ids = torch.broadcast_tensors(*small)
    if name in PRODUCTS:
        rec.gate(one_ids, other_ids)
    else:
        rec.add(one_ids, other_ids, left.depth, right.depth)
    return Operand(left.ids if left.varying else right.ids, repeated, depth)


def _constant(rec: Recorder, name: str, ids: Tensor, tensor: Tensor, out: Tensor) -> None:
    """An operand that is no activation: a parameter follows the channels; any other tensor's size
    is a fact of the code.
    """
    offset = out.dim() - tensor.dim()
    varying = varying_dims(ids)
    view = rec.view(tensor)
    for d in (d for d in range(tensor.dim()) if tensor.shape[d] > 1 and d + offset in varying):
        line = along(ids, d + offset)
        dim = view.dims[d] if view else None
        if view is None or dim is None or line is None:
            rec.pin(ids, f"combined with a constant tensor of a fixed size ({name})")
            rec.use_whole(tensor)
        else:
            rec.axis(view.name, dim, line)
