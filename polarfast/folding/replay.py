"""Runs of the masked network: what the readers of removed channels see in it, and how each of them
takes it over.

Each convolution and linear layer is met as the call that it is in the traced graph.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import left_behind, tensors_of_model
from ..errors import PlanError
from ..kernels.gather import gather_channels
from ..running import Operators, call_model, plain_eager
from ..tracing.graph import ProjectionCall

#: A field counts as one constant (or as proportional to another field) up to this share of its
#: largest value: float64 rounding.
TOLERANCE = 1e-11
DEPENDS, DIFFERS = "depends on the input", "differs from place to place"
COUNTED = "depends on how many samples there are"


@dataclass
class Field:
    """What one reader sees in R removed channels.

    Attributes:
        values: float64 [R, places], of the first sample; [R, 1] where none differs from place to
            place.
        level: float64 [R], the one value that stands for each best.
        off: float64 [R], how far any is from it at most.
        largest: the largest absolute value.
        varies: whether the samples differ.
        middle: `level` is the value in the middle, not the mean.
    """

    values: Tensor
    level: Tensor
    off: Tensor
    largest: float
    varies: bool
    middle: bool

    def differs_from(self, other: "Field") -> bool:
        """Whether another run showed something else."""
        places, others = self.values.shape[1], other.values.shape[1]
        if self.varies or other.varies or (places != others and 1 not in (places, others)):
            return True
        apart = (self.values - other.values).abs().max()
        return not float(apart) <= self.largest * TOLERANCE

    def problem(self) -> str | None:
        """Why a channel is not one value, if so."""
        return DIFFERS if self.values.shape[1] > 1 else None


def observe(seen: Tensor, in_the_middle: bool) -> Field:
    """Sum up what a call reads.

    Args:
        seen: float64 [N, R, ...].
        in_the_middle: the value in the middle stands for the others, not their mean: a zero-padded
            reader sees something else at the border anyway.
    """
    flat = seen.flatten(2) if seen.dim() > 2 else seen.unsqueeze(2)
    low, high = flat.amin((0, 2)).cpu(), flat.amax((0, 2)).cpu()
    largest = float(torch.maximum(low.abs(), high.abs()).max())
    limit = largest * TOLERANCE
    if bool((high - low <= limit).all()):
        values = flat[0, :, :1].cpu().clone()  # a view would keep all of what was read
        return Field(values, values[:, 0], torch.zeros_like(low), largest, False, in_the_middle)
    level = flat.mean((0, 2))
    if in_the_middle:
        middle = seen
        for size in seen.shape[2:]:
            middle = middle.select(2, size // 2)
        level = middle.mean(0)
    level = level.cpu()
    varies = len(flat) > 1 and not bool(((flat - flat[:1]).abs() <= limit).all())
    off = torch.maximum((high - level).abs(), (low - level).abs())
    return Field(flat[0].cpu().clone(), level, off, largest, varies, in_the_middle)


@dataclass
class ReaderFold:
    """How one reader takes over the constants of the removed channels that it read.

    Attributes:
        weight: the reader's parameter name.
        sink: the tensor that takes up what the constants add to the reader's output; None: nothing
            does (it is cancelled, or it is lost).
        shifted: input positions whose constants `sink` takes up.
        level: float64, the one value that each of `shifted` counts as.
        shift: float64 [C_out], what goes into `sink` where that is not the reader's own weights
            times `level`.
        columns: constant channel's position -> removed channels' positions that it stands for, and
            each one's multiple of the constant channel.
        note: why the fold is not exact; None if it is.
    """

    weight: str
    sink: str | None = None
    shifted: Tensor | None = None
    level: Tensor | None = None
    shift: Tensor | None = None
    columns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    note: str | None = None

    @property
    def adds(self) -> bool:
        """Whether anything goes into `sink`."""
        return self.sink is not None and (self.level is not None or self.shift is not None)

    def take(self, positions: Tensor, level: Tensor, note: str | None) -> None:
        """Let `sink` take up one value for each of these removed channels."""
        self.shifted, self.level, self.note = positions, level, note


@dataclass
class Fold:
    """All constants of a network.

    Attributes:
        readers: by index into `graph.projections`.
        constant: classes that stay as constant channels (in a grouped convolution, one channel per
            group).
        lasting: whether it would be the same with other weights of convolutions and linear layers.
    """

    readers: dict[int, ReaderFold] = field(default_factory=dict)
    constant: set[int] = field(default_factory=set)
    lasting: bool = True

    def notes(self) -> dict[str, str]:
        """Reader's weight name -> why its fold is not exact."""
        return {reader.weight: reader.note for reader in self.readers.values() if reader.note}


def shift_of(
    call: ProjectionCall, weight: Tensor, reader: ReaderFold, rows: Tensor | None = None
) -> Tensor:
    """What a reader's folded constants add to its output channels.

    Args:
        call: the reader.
        weight: its full-size weight, of any floating point dtype.
        reader: its fold; `adds` is True.
        rows: output channels asked for; by default, all.

    Returns:
        Float64 [C_out] or [rows], on the CPU, new.
    """
    if reader.shift is not None:
        return reader.shift.clone() if rows is None else reader.shift[rows]
    assert reader.level is not None and reader.shifted is not None
    level, positions = reader.level.to(weight.device), reader.shifted.to(weight.device)
    if call.groups == 1 and not call.transposed:
        used = gather_channels(weight.detach(), rows, positions).double()
        return ((used.flatten(2).sum(2) if used.dim() > 2 else used) @ level).cpu()
    taps = weight.detach().double()
    value = torch.zeros(call.inputs.numel(), dtype=torch.float64, device=weight.device)
    value[positions] = level
    if call.transposed:
        taps = taps.flatten(2).mean(2) if taps.dim() > 2 else taps
        per_group = taps.view(call.groups, -1, taps.shape[1]) * value.view(call.groups, -1, 1)
        shift = per_group.sum(1).flatten().cpu()
        return shift if rows is None else shift[rows]
    taps = taps.flatten(2).sum(2) if taps.dim() > 2 else taps
    per_group = taps.view(call.groups, -1, taps.shape[1]) * value.view(call.groups, 1, -1)
    shift = per_group.sum(2).flatten().cpu()
    return shift if rows is None else shift[rows]


#: Projections, and where their input and their weight stand among the arguments.
PROJECTIONS = {"convolution": (0, 1), "addmm": (1, 2), "mm": (0, 1)}
COPIES = frozenset(("clone", "_to_copy"))


class StaysDouble(Operators):
    """Keeps in float64 what is in float64, where the network's code asks for a shorter dtype."""

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        asked = kwargs.get("dtype")
        if asked is not None and asked.is_floating_point and _is_double(args):
            kwargs = {**kwargs, "dtype": torch.float64}
        return self.named(func.overloadpacket.__name__, func, args, kwargs)

    def named(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator of this name."""
        return func(*args, **kwargs)


def _is_double(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64


class _Projections(StaysDouble):
    """Meets each convolution and linear layer of a model as the call it is in the traced graph.

    Args:
        tensors: the model's parameters and buffers by name.
        calls: `graph.projections`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], calls: list[ProjectionCall]) -> None:
        super().__init__()
        self.calls = calls
        self.names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        self.copies: list[Tensor] = []  # kept, so that no other tensor gets their addresses
        order: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            order.setdefault(call.weight, []).append(i)
        self.waiting: dict[str, Iterator[int]] = {n: iter(indices) for n, indices in order.items()}

    def named(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        place = PROJECTIONS.get(name)
        if place is None:
            return self.other(name, func, args, kwargs)
        weight = args[place[1]]
        index = next(self.waiting.get(self.names.get(weight.data_ptr(), ""), iter(())), None)
        if index is None:
            return self.other(name, func, args, kwargs)
        x = self.read(index, args[place[0]], args)
        args = (*args[: place[0]], x, *args[place[0] + 1 :])
        return self.write(index, self.project(index, func, args))

    def other(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run what is no call of the graph."""
        out = func(*args, **kwargs)
        if name in COPIES and args[0].data_ptr() in self.names:
            self.names[out.data_ptr()] = self.names[args[0].data_ptr()]
            self.copies.append(out)
        return out

    def read(self, index: int, x: Tensor, args: Any) -> Tensor:
        """What the call is to read instead of `x`; `args`: of its operator."""
        return x

    def project(self, index: int, func: Any, args: Any) -> Tensor:
        """The call's output."""
        return func(*args)

    def write(self, index: int, out: Tensor) -> Tensor:
        """What the call is to return instead of `out`."""
        return out


class Reads(_Projections):
    """Notes what each call reads in the channels asked for."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        calls: list[ProjectionCall],
        wanted: dict[int, Tensor],
    ) -> None:
        super().__init__(tensors, calls)
        self.wanted, self.fields = wanted, dict[int, Field]()

    def read(self, index: int, x: Tensor, args: Any) -> Tensor:
        positions = self.wanted.get(index)
        if positions is not None and x.numel():
            seen = x.index_select(1, positions.to(x.device))
            if x.dim() > 2 and _taps(args[1]) == 1 and not any(args[4]):
                for dim, stride in enumerate(args[3], 2):  # in between it reads nothing
                    seen = seen[(slice(None),) * dim + (slice(None, None, stride),)]
            call = self.calls[index]
            self.fields[index] = observe(seen, in_the_middle=call.padded or call.transposed)
        return x


def _taps(weight: Tensor) -> int:
    return math.prod(weight.shape[2:])


class AsFolded(_Projections):
    """Lets each reader whose fold is not exact see what the plan says it sees: instead of the
    removed channels' constants, the one value that is folded for each.
    """

    def __init__(self, model: nn.Module, fold: Fold, calls: list[ProjectionCall]) -> None:
        tensors = tensors_of_model(model)
        super().__init__(tensors, calls)
        self.readers = {i: reader for i, reader in fold.readers.items() if reader.note}
        self.shifts = {
            i: shift_of(calls[i], tensors[calls[i].weight], reader)
            for i, reader in self.readers.items()
            if reader.adds
        }

    def read(self, index: int, x: Tensor, args: Any) -> Tensor:
        reader = self.readers.get(index)
        if reader is None or reader.shifted is None:
            return x
        return x.index_fill(1, reader.shifted.to(x.device), 0.0)

    def write(self, index: int, out: Tensor) -> Tensor:
        shift = self.shifts.get(index)
        if shift is None:
            return out
        return out + shift.to(out.device).view(1, -1, *[1] * (out.dim() - 2))


#: What torch says where dtypes do not go together.
OF_DTYPES = ("dtype", "datatype", "scalar type", "same type", "Input type (")


def run_double(model: nn.Module, inputs: Any) -> Any:
    """A float64 model on float64 inputs.

    Raises:
        PlanError: the network's code asks for another dtype.
    """
    try:
        with plain_eager(), StaysDouble():
            return call_model(model, inputs)
    except RuntimeError as error:
        if not any(part in str(error) for part in OF_DTYPES):
            raise
        raise PlanError(not_in_double(model, error)) from error


def not_in_double(model: nn.Module, error: Exception) -> str:
    """Why a network cannot run there, and what to do."""
    what = left_behind(model) or (
        "let its code take the dtype from its input (torch.zeros(…, dtype=x.dtype)), and check "
        "inputs outside of the network"
    )
    return (
        "the network cannot run in float64, in which removed channels are worked out: "
        f"{(str(error) or type(error).__name__).rstrip('.')}. So: {what}"
    )
