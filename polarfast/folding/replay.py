"""Runs of the masked network: what the readers of removed channels see in it, and how each of them
takes it over.

Each convolution and linear layer is met as the call that it is in the traced graph.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..copies import tensors_of_model
from ..errors import PlanError
from ..inputs import (
    Operators,
    call_model,
    device_of,
    map_numbers,
    map_tensors,
    plain_eager,
    seeded,
    tensors_in,
)
from ..kernels.gather import gather_channels
from ..tracing.graph import ProjectionCall
from ..tracing.projections import convolution_fits, convolution_shape

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
#: Operators that look values up by whole numbers.
LOOKUPS = frozenset("embedding index index_select gather".split())
#: Operators whose result may be the same for all inputs near an example, and not for others.
LEVELS = frozenset(
    "sign sgn heaviside ceil floor round trunc clamp clamp_min clamp_max hardtanh relu".split()
)
#: Other views of a weight, or copies of one.
VIEWS = frozenset("t transpose permute view _unsafe_view unsqueeze expand detach alias".split())
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


class _Reads(_Projections):
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


class Varied(Enum):
    """How a run without weights may differ from what the inputs ask for, past all projections:
    masks from lengths, look-ups and the like are drawn; single decisions (`if x.mean() > 5`) are
    KEPT, FLIPPED or TOSSED; LESS: kept, and whole numbers among the inputs are smaller. Numbers
    that Python reads (`x.mean().item()`) become large where FLIPPED or TOSSED, far below zero with
    LESS.
    """

    KEPT, FLIPPED, TOSSED, LESS = range(4)


class Unfit(Exception):
    """A network that does not run without its weights.

    Attributes:
        names: of the weights that it asked for; none where it lacks something else.
    """

    def __init__(self, why: str, names: frozenset[str] = frozenset()) -> None:
        super().__init__(why)
        self.names = names


class _Hollow(_Reads):
    """Instead of computing projections with weights that are not there, draws their outputs.

    What a removed channel leaves behind does not depend on any of these; so a field that
    is the same whatever they are is what the real network shows. For a fraction of the time.

    Args:
        tensors, calls, wanted: as in `_Reads`; of a model with zeros for the projections' weights.
        hollow: names of the weights that are not there.
        seed: of the numbers drawn.
        varied: how what follows from the inputs past all projections is drawn, too.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        calls: list[ProjectionCall],
        wanted: dict[int, Tensor],
        hollow: set[str],
        seed: int,
        varied: Varied | None = None,
    ) -> None:
        super().__init__(tensors, calls, wanted)
        self.varied, self.raw = varied, WeakIdKeyDictionary()
        self.drawn = WeakIdKeyDictionary()
        self.decided = False  # whether the network decided something by one number
        self.read_numbers = False  # whether its code read one
        self.hollow = {address for address, name in self.names.items() if name in hollow}
        self.draws = _Draws(seed)

    def start(self, inputs: Any) -> Any:
        """The inputs to run on: truth values are drawn."""

        def raw(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.bool:
                tensor = self.draws.coins(tensor)
            elif self.varied == Varied.LESS and not tensor.is_floating_point():
                tensor = self.draws.up_to(tensor)
            self.raw[tensor] = True
            return tensor

        if self.varied is None:
            return inputs
        if self.varied == Varied.LESS:
            inputs = map_numbers(inputs, self.draws.below)
        return map_tensors(inputs, raw)

    def _vary(self, name: str, args: Any, out: Any) -> Any:
        """The result of an operator on the inputs, drawn where it decides something or is looked
        up.
        """
        numbers = [tensor for tensor in tensors_in(args) if tensor in self.raw]
        if numbers and type(out) is float:
            return self._read_by_python(out)
        if not numbers or not isinstance(out, Tensor):
            return out
        if out.dtype == torch.bool and any(number.dtype != torch.bool for number in numbers):
            out = self._decided(out)
        elif out.is_floating_point() and name in LEVELS:
            out = out * self.draws.shares(out)
        elif out.is_floating_point() and any(not n.is_floating_point() for n in numbers):
            if name in LOOKUPS:
                out = self.draws.take(list(out.shape), out.device)
            elif name == "_to_copy":
                out = out * (0.5 + 0.5 * self.draws.share())
        self.raw[out] = True
        return out

    def _read_by_python(self, number: float) -> float:
        """What the network's code gets in place of a number: it may be held against anything."""
        self.decided = self.read_numbers = True
        far = 1000 * (1 + abs(number))
        return {Varied.KEPT: number, Varied.LESS: -far}.get(self.varied, far)  # type: ignore[arg-type]

    def _decided(self, out: Tensor) -> Tensor:
        """A comparison's result, drawn; one number alone is a decision."""
        if out.numel() != 1:
            return self.draws.coins(out)
        self.decided = True
        if self.varied == Varied.TOSSED:
            return self.draws.coins(out)
        return ~out if self.varied == Varied.FLIPPED else out

    def other(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hollow = self.hollow & _addresses(args, kwargs)
        if "batch_norm" in name and args[0] in self.drawn and args[3] is not None:
            # As if its statistics were those of what was drawn: then its outputs are spread like
            # real ones, and a gate behind it opens and closes.
            args = (*args[:3], torch.zeros_like(args[3]), torch.ones_like(args[4]), *args[5:])
        if self.varied is not None and name.startswith("grid_sampler") and args[1] in self.raw:
            outside_too = self.draws.take(list(args[1].shape), args[1].device)
            args = (args[0], outside_too, *args[2:])
        if not hollow:
            out = super().other(name, func, args, kwargs)
            return out if self.varied is None else self._vary(name, args, out)
        if name in VIEWS:
            return func(*args, **kwargs)
        if name in COPIES:
            return args[0].detach()
        raise Unfit(f"{func} reads a weight", frozenset(self.names[each] for each in hollow))

    def project(self, index: int, func: Any, args: Any) -> Tensor:
        x, weight = (args[i] for i in PROJECTIONS[func.overloadpacket.__name__])
        if not _fits(func.overloadpacket.__name__, x, weight, args):
            raise Unfit("a layer reads another number of channels")
        if weight.data_ptr() not in self.hollow:
            return super().project(index, func, args)
        shape = convolution_shape(args) if func.overloadpacket.__name__ == "convolution" else None
        drawn = self.draws.take(shape or [x.shape[0], weight.shape[1]], x.device)
        self.drawn[drawn] = True
        return drawn


class _Draws:
    """Random float64 tensors, all cut out of one: drawing takes longer than using them."""

    SLACK = 8192

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.count = 0
        self.pool = torch.empty(0)

    def share(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.generator))

    def shares(self, like: Tensor) -> Tensor:
        """Numbers in [0.5, 1)."""
        return (0.5 + 0.5 * torch.rand(like.shape, generator=self.generator)).to(like)

    def up_to(self, most: Tensor) -> Tensor:
        """Whole numbers from 1 to each of these, or from 0 if none is above 1, as in a mask."""
        if not bool((most > 1).any()):
            return most * self.coins(most)
        drawn = torch.rand(most.shape, generator=self.generator, dtype=torch.float64).to(
            most.device
        )
        return torch.where(most > 0, 1 + (drawn * most).to(most.dtype).clamp(max=most - 1), most)

    def below(self, most: int) -> int:
        """A whole number from 1 to below this, if there is one."""
        return min(most, 1 + int(self.share() * (most - 1)))

    def coins(self, like: Tensor) -> Tensor:
        """Random truth values."""
        return (torch.rand(like.shape, generator=self.generator) < 0.5).to(like.device)

    def take(self, shape: list[int], device: torch.device) -> Tensor:
        """A tensor like no other that was taken."""
        wanted = math.prod(shape)
        if self.pool.numel() < wanted + self.SLACK:
            drawn = torch.empty(wanted + self.SLACK, dtype=torch.float32, device="cpu")
            self.pool = drawn.normal_(generator=self.generator).to(device, torch.float64)
        self.count = (self.count + 1) % self.SLACK
        # A copy, since networks work in place.
        return self.pool[self.count : self.count + wanted].clone().view(shape)


def _fits(name: str, x: Tensor, weight: Tensor, args: Any) -> bool:
    """Whether a projection's input has the channels that its weight reads."""
    return convolution_fits(args) if name == "convolution" else x.shape[1] == weight.shape[0]


def _taps(weight: Tensor) -> int:
    return math.prod(weight.shape[2:])


def _addresses(args: Any, kwargs: dict[str, Any]) -> set[int]:
    found: set[int] = set()
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            found.add(arg.data_ptr())
        elif isinstance(arg, (list, tuple)):
            found.update(part.data_ptr() for part in arg if isinstance(part, Tensor))
    return found


#: What may go wrong in a network's code on numbers that are unlike any real ones.
_ANY = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


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


def run_double(model: nn.Module, inputs: Any) -> Any:
    """A float64 model on float64 inputs.

    Raises:
        PlanError: the network's code asks for another dtype.
    """
    try:
        with plain_eager(), StaysDouble():
            return call_model(model, inputs)
    except RuntimeError as error:
        if "dtype" not in str(error) and "same type" not in str(error):
            raise
        raise PlanError(_not_in_double(error)) from error


def _not_in_double(error: Exception) -> str:
    return (
        "the network cannot run in float64, in which removed channels are worked out: "
        f"{str(error) or type(error).__name__}. Let its code take the dtype from its input "
        "(torch.zeros(…, dtype=x.dtype)), and check inputs outside of the network"
    )


@dataclass
class Runs:
    """Runs of one float64 copy of a model.

    Attributes:
        model, tensors: the copy, and its parameters and buffers by name.
        calls: `graph.projections`.
        weights: those that are not there, but zeros of their shapes; where something else than a
            convolution or a linear layer reads one, it is put in its place.
        decided: whether the last varied run has decided something by the inputs.
        read_numbers: whether the network's code has read a number of the inputs then.
        filled: whether a weight was put in its place.
    """

    model: nn.Module
    tensors: dict[str, Tensor]
    calls: list[ProjectionCall]
    weights: dict[str, Tensor] = field(default_factory=dict)
    decided: bool = False
    read_numbers: bool = False
    filled: bool = False

    def fields(
        self, inputs: Any, wanted: dict[int, Tensor], seed: int, varied: Varied | None = None
    ) -> dict[int, Field] | None:
        """For each call index in `wanted`, what the call reads in those input channels; None where
        a model does not run without its weights.

        Args:
            seed: of all that is drawn, by the network itself, too.
            varied: as in `_Hollow`.

        Raises:
            PlanError: what a whole model reads is not finite.
        """
        while self.weights:
            try:
                with seeded(seed, device_of(self.model)):
                    return self._drawn(inputs, wanted, seed, varied)
            except Unfit as unfit:
                if not unfit.names:
                    return None
                self._fill(unfit.names)
        with seeded(seed, device_of(self.model)), _Reads(self.tensors, self.calls, wanted) as reads:
            try:
                run_double(self.model, inputs)
            except (AssertionError, LookupError, TypeError, ValueError) as error:
                raise PlanError(_not_in_double(error)) from error
        for index, seen in reads.fields.items():
            if not math.isfinite(seen.largest):
                raise PlanError(
                    f"{self.calls[index].weight} reads NaN or inf in a removed channel, on random "
                    "inputs between the example inputs' smallest and largest value: use example "
                    "inputs like the real ones, and check that training has not diverged"
                )
        return reads.fields

    def _drawn(
        self, inputs: Any, wanted: dict[int, Tensor], seed: int, varied: Varied | None
    ) -> dict[int, Field] | None:
        reads = _Hollow(self.tensors, self.calls, wanted, set(self.weights), seed, varied)
        inputs = reads.start(inputs)
        try:
            with reads, plain_eager():
                call_model(self.model, inputs)
        except Unfit:
            raise
        except _ANY:
            # Its code may well want other numbers than random ones (an index, a box): then the
            # whole network runs, and any error that is one shows.
            return None
        finally:
            self.decided, self.read_numbers = reads.decided, reads.read_numbers
        return reads.fields

    def _fill(self, names: Iterable[str]) -> None:
        for name in names:
            self.tensors[name].data = self.weights.pop(name).detach().double()
        self.filled = True
