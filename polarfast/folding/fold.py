"""What removed channels leave behind: constants, handed on to whatever reads them.

A channel with γ = 0 is not nothing. It is the constant act(β), whatever the input, and its readers
see it. The constants are read off the real network: a float64 copy with γ = 0 on the removed
channels runs in eval mode, and what a reader sees in a removed channel *is* the constant. Where it
is the same everywhere, it becomes a bias; where zero padding (or another linear map that all
removed channels share) shapes it, one constant channel with γ = 0, β = 1 carries that shape for
all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..copies import doubled, mask, tensors_of_model
from ..errors import ArgumentError
from ..inputs import Inputs, device_of
from ..layers import CONVS, TRANSPOSED, plain_type
from ..tracing.classes import Channels
from ..tracing.graph import ProjectionCall
from .carriers import Carriers
from .replay import COUNTED, DEPENDS, Field, Fold, ReaderFold, shift_of
from .runs import Runs, Varied
from .sizes import more_samples, other_sizes

#: What may become of the constants: the first is what `plan` and `slim` do unless told otherwise.
FOLDS = ("exact", "bias", "none")
#: Seeds of two runs: what differs between them depends on the input.
FIRST, SECOND = 1, 2
#: So often are the network's decisions tossed until it runs.
TOSSES = 4


def fold_constants(
    model: nn.Module,
    channels: Channels,
    kept: dict[str, Tensor],
    alive: Tensor,
    inputs: Inputs,
    mode: str,
    forced: Iterable[int] = (),
) -> Fold:
    """Work out what the readers of removed channels must take over.

    Args:
        model: the original network.
        channels: its channel classes.
        kept: γ name -> kept channels.
        alive: bool [graph.count], without constant channels.
        inputs: what to run it on.
        mode: "none" (β is dropped first), "bias" or "exact".
        forced: classes that stay as constant channels whether or not they are needed, as a plan
            says.
    """
    wanted = _wanted(channels, alive)
    result = Fold(constant=set(forced))
    if not wanted:
        return result
    masked = Masked(model, channels, kept, inputs.few(), mode == "none")
    sinks = Sinks(model, channels)
    look = _Look(masked, wanted)
    result.lasting = not look.real and not masked.hollow.filled
    pending: dict[int, str] = {}
    for i, seen in look.fields.items():
        if seen.largest == 0 and i not in look.depends:
            continue
        call = channels.graph.projections[i]
        reader = result.readers[i] = ReaderFold(call.weight, sinks.name(i))
        problem = look.uncarried(i) or seen.problem()
        if problem is None and i in look.sized:
            problem = "is another constant"
        if problem is None and (call.padded or call.transposed):
            problem = "zero padding: not exact at the border"
        if problem is None and sinks.lost(i):
            problem = "its layer has no bias that could take up a constant"
        if problem is None or mode == "bias":
            why = problem and look.why(i, problem, channels)
            reader.take(wanted[i], look.here(i).level, why)
        else:
            pending[i] = problem
    if pending:
        _carry(result, look, pending, Carriers(channels, alive), sinks)
    sinks.settle(result)
    return result


class Folded:
    """The constants of removed channels. Valid for the traced model (`Traced`) and the same removed
    channels while the values that the constants were read off, all parameters and buffers but the
    weights of convolutions and linear layers, are what they were.

    Attributes:
        fold: the constants.

    Args:
        model, channels: the network and its channel classes.
        alive: bool [graph.count], the ids that stay, without constant channels.
        fold: their fold.
        mode: what became of them ("exact", "bias", "none").
    """

    def __init__(
        self, model: nn.Module, channels: Channels, alive: Tensor, fold: Fold, mode: str
    ) -> None:
        self.fold = fold
        self._alive, self._mode = alive, mode
        self._values = {n: t.detach().clone() for n, t in _values(model, channels).items()}

    def fits(
        self, model: nn.Module, channels: Channels, alive: Tensor, forced: set[int], mode: str
    ) -> bool:
        """Whether `fold_constants`, given these, would find the same."""
        if not self.fold.lasting or (forced, mode) != (self.fold.constant, self._mode):
            return False
        # By value: edits through .data leave no other trace.
        now = _values(model, channels)
        return (
            torch.equal(alive, self._alive)
            and now.keys() == self._values.keys()
            and all(_same(value, self._values[name]) for name, value in now.items())
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)  # which takes one device only


def _values(model: nn.Module, channels: Channels) -> dict[str, Tensor]:
    projections = channels.graph.projection_weights()
    return {name: t for name, t in tensors_of_model(model).items() if name not in projections}


def new_biases(model: nn.Module, channels: Channels, fold: Fold) -> dict[str, Tensor]:
    """Name of each bias that the fold creates -> the classes of the channels that it is added to,
    int64 [C_out]; it has an element for each that stays.
    """
    existing = tensors_of_model(model).keys()
    return {
        reader.sink: channels.label[channels.graph.projections[index].outputs]
        for index, reader in fold.readers.items()
        if reader.adds and reader.sink is not None and reader.sink not in existing
    }


def _wanted(channels: Channels, alive: Tensor) -> dict[int, Tensor]:
    """Index of every reader that stays -> the removed channels that it reads."""
    wanted = {}
    for i, call in enumerate(channels.graph.projections):
        if call.counted and not call.depthwise and bool(alive[call.outputs].any()):
            gone = (~alive[call.inputs]).nonzero().flatten()
            if gone.numel():
                wanted[i] = gone
    return wanted


class Masked:
    """The network with γ = 0 on the removed channels, in float64, and what readers see in it."""

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        kept: dict[str, Tensor],
        inputs: Inputs,
        zero_beta: bool,
    ) -> None:
        self._model, self._kept, self._zero_beta = model, kept, zero_beta
        self._graph, self.inputs, self._device = channels.graph, inputs, device_of(model)

    @property
    def calls(self) -> list[ProjectionCall]:
        """The convolutions and linear layers of the graph."""
        return self._graph.projections

    @cached_property
    def whole(self) -> Runs:
        """The network itself."""
        runs = self._copy({})
        runs.model.double()  # layers that keep tensors of other kinds convert them there
        return runs

    @cached_property
    def hollow(self) -> Runs:
        """The network without the weights of its projections, and so whatever these are."""
        tensors = tensors_of_model(self._model)
        return self._copy({name: tensors[name] for name in self._graph.projection_weights()})

    def _copy(self, weights: dict[str, Tensor]) -> Runs:
        copied, tensors = doubled(self._model, weights)
        mask(tensors, self._kept, self._zero_beta)
        return Runs(copied.eval(), tensors, self._graph.projections, weights)

    def see(
        self,
        runs: Runs,
        wanted: dict[int, Tensor],
        seed: int,
        inputs: Inputs | None = None,
        varied: Varied | None = None,
    ) -> dict[int, Field]:
        """What readers see on random inputs; none if the network does not run without weights.

        Args:
            inputs: in place of the network's own, as of another size.
            varied: see `Runs.fields`.
        """
        chosen = inputs or self.inputs
        found: dict[int, Field] = {}
        for made in chosen.each(device=self._device, dtype=torch.float64, seed=seed):
            fields = runs.fields(made, wanted, seed, varied)
            if fields is None:
                return {}
            for i, seen in fields.items():
                before = found.get(i, seen)
                found[i] = replace(before, varies=True) if before.differs_from(seen) else before
        return found


class _Look:
    """What the readers see in the removed channels.

    Attributes:
        masked, wanted: where, and at what.
        fields: by index into `graph.projections`; own: the same at the size of the example, which
            may show less.
        depends: readers that see something that depends on the input.
        counted: readers that see another constant where there are more samples.
        sized: readers that see another constant where the input is of another size.
        real: readers that were looked at in the whole network.
    """

    def __init__(self, masked: Masked, wanted: dict[int, Tensor]) -> None:
        self.masked, self.wanted = masked, wanted
        self.own = own = masked.see(masked.hollow, wanted, FIRST)
        # At the size of the example a border may be all there is, or not there at all.
        self._inputs: dict[int, Inputs] = {}  # other ones, by reader
        self.fields = dict(own)
        for group in other_sizes(masked.inputs) if own else ():
            if any([self._note(other) for other in group]):
                break
        agains = self._agains() if own else [{}]
        shown = {
            i
            for i, field in own.items()
            if any(i in again and field.differs_from(again[i]) for again in agains)
        }
        self.real = shown | {i for i in wanted if i not in own or i not in agains[0]}
        self.sized = {
            i
            for i, field in self.fields.items()
            if i not in self.real
            and own[i].problem() is None
            and field.differs_from(own[i])
            and field.problem() is None
        }
        more = masked.see(masked.hollow, wanted, FIRST, more_samples(masked.inputs)) if own else {}
        self.counted = {
            i for i, f in more.items() if i in own and i not in self.real and f.differs_from(own[i])
        }
        self.depends: set[int] = set()
        if self.real:
            unsure = {i: wanted[i] for i in self.real}
            first, second = (masked.see(masked.whole, unsure, seed) for seed in (FIRST, SECOND))
            # A gate may not move on two inputs, and still follow whatever is before it.
            self.fields = {i: f for i, f in self.fields.items() if i not in unsure} | first
            self.depends = shown | {
                i for i in first if i not in second or first[i].differs_from(second[i])
            }

    def uncarried(self, index: int) -> str | None:
        """Why nothing can stand for what a reader sees, if so."""
        if index in self.depends:
            return DEPENDS
        return COUNTED if index in self.counted else None

    def here(self, index: int) -> Field:
        """What a reader sees at the size of the example: what is folded where one value must do."""
        return self.fields[index] if index in self.real else self.own.get(index, self.fields[index])

    def whole_here(self, index: int) -> bool:
        """Whether one value is all that a reader sees at the size of the example, and not at
        another.
        """
        call = self.masked.calls[index]
        plain = self.here(index).problem() is None and not (call.padded or call.transposed)
        differs = self.fields[index].problem() is not None or index in self.sized
        return plain and differs and index not in self.real

    def why(self, index: int, problem: str, channels: Channels, left: Tensor | None = None) -> str:
        """Why one value for each channel (bool [R]: for these) is not exact."""
        if self.whole_here(index):
            return f"{problem} {ELSEWHERE}"
        return _note(problem, self.here(index), channels, left)

    def _note(self, other: Inputs) -> bool:
        """Look at other inputs, and keep what shows more; whether the network runs on them."""
        fields = self.masked.see(self.masked.hollow, self.wanted, FIRST, other)
        if fields.keys() != self.own.keys():
            return False
        for i, field in fields.items():
            own, before = self.own[i], self.fields[i]
            places = field.problem() is not None
            larger = i in self._inputs and before.problem() is None
            if (
                i not in self._inputs
                or (places and before.problem() is None)
                or (larger and field.differs_from(own) and not before.differs_from(own))
            ):
                self.fields[i], self._inputs[i] = field, other
        return True

    def _agains(self) -> list[dict[int, Field]]:
        """Second looks, in which all that may differ does; the first one is there in any case."""

        def see(varied: Varied | None, seed: int = SECOND) -> dict[int, Field]:
            return self.masked.see(self.masked.hollow, self.wanted, seed, varied=varied)

        looks = [see(Varied.KEPT)]
        hollow = self.masked.hollow
        decided, less = hollow.decided, hollow.read_numbers or self.masked.inputs.whole_numbers
        looks[0] = looks[0] or see(None)
        if decided:
            flipped = see(Varied.FLIPPED)
            for seed in () if flipped else range(SECOND, SECOND + TOSSES):
                flipped = flipped or see(Varied.TOSSED, seed)
            looks.append(flipped)
        if less:
            looks.append(see(Varied.LESS))
        return looks

    @property
    def seen(self) -> "_Fields":
        """What readers see in removed channels."""
        here = {i: f for i, f in self.own.items() if i in self._inputs and i not in self.real}
        return _Fields(self.fields, here)

    def unit(self, carriers: Carriers, indices: Iterable[int]) -> "_Fields":
        """What these readers see in constant channels."""
        left = {i: self.wanted[i] for i in indices}
        found = _Fields({}, {})
        hollow = {i: gone for i, gone in left.items() if i not in self.real}
        if hollow:
            runs = self.masked.hollow
            with carriers.shown(runs.tensors):
                here = self.masked.see(runs, hollow, FIRST)
                for other in _each_once(self._inputs.get(i) for i in hollow):
                    mine = {i: g for i, g in hollow.items() if self._inputs.get(i) is other}
                    if other is None:
                        found.large.update({i: f for i, f in here.items() if i in mine})
                    else:
                        found.large.update(self.masked.see(runs, mine, FIRST, other))
                        found.here.update({i: f for i, f in here.items() if i in mine})
        real = {i: gone for i, gone in left.items() if i not in found.large}
        if real:
            with carriers.shown(self.masked.whole.tensors):
                found.large.update(self.masked.see(self.masked.whole, real, FIRST))
                for i in real:
                    found.here.pop(i, None)
        return found


def _each_once(found: Iterable[Inputs | None]) -> list[Inputs | None]:
    """By identity."""
    return list({id(each): each for each in found}.values())


@dataclass
class _Fields:
    """Fields by reader: at the larger size, and at that of the example where there are two."""

    large: dict[int, Field]
    here: dict[int, Field]


def _side_by_side(index: int, seen: _Fields, unit: _Fields) -> tuple[Field, Field]:
    """What a reader sees at the size of the example and at the other one in one row: where one
    constant is a multiple of another in both, it is so at every size.
    """
    large, unit_large = seen.large[index], unit.large[index]
    if index not in unit.here:
        return large, unit_large
    rows: list[list[Tensor]] = [[], []]
    for pair in ((seen.here[index], unit.here[index]), (large, unit_large)):
        places = max(field.values.shape[1] for field in pair)
        for row, field in zip(rows, pair, strict=True):
            row.append(field.values.expand(-1, places))
    values = [torch.cat(row, 1) for row in rows]
    return replace(large, values=values[0]), replace(unit_large, values=values[1])


#: What is added to the reason where a fold is exact at the size of the example.
ELSEWHERE = "on inputs of other sizes: plan with an example as large as in use"


def _carry(
    result: Fold, look: _Look, pending: dict[int, str], carriers: Carriers, sinks: "Sinks"
) -> None:
    """Let constant channels carry what these readers see; where they cannot, fold one value for
    each channel and say so.
    """
    channels = carriers.channels
    # One weight, several uses: each must have it carry the same.
    every = {tuple(sinks.calls_of_weight(i)) for i in pending}
    shared = [calls for calls in every if len(calls) > 1]
    alone = {i for calls in shared if not pending.keys() >= {*calls} for i in calls}
    carried = {i for i in pending if look.uncarried(i) is None} - alone
    seen, unit = look.seen, look.unit(carriers, carried)
    found: dict[int, tuple[set[int], Tensor]] = {}
    for i in unit.large:
        call, positions, reader = channels.graph.projections[i], look.wanted[i], result.readers[i]
        both = _side_by_side(i, seen, unit)
        needed, left = carriers.carry(reader, call, positions, *both)
        if bool(left.any()) and i in unit.here:
            reader.columns.clear()
            needed, left = set(), torch.ones_like(left)
            if not look.whole_here(i):  # else it needs no carrier there
                own = look.here(i), unit.here[i]
                needed, left = carriers.carry(reader, call, positions, *own)
                reader.note = f"{pending[i]} {ELSEWHERE}"
        found[i] = needed, left
    for calls in shared:
        if found.keys() >= {*calls} and _agree([result.readers[i] for i in calls]):
            continue
        for i in calls:
            found.pop(i, None)
            if i in result.readers:
                result.readers[i].columns.clear()
    for i, problem in pending.items():
        positions = look.wanted[i]
        everything = torch.ones(positions.numel(), dtype=torch.bool, device="cpu")
        needed, left = found.get(i, (set(), everything))
        result.constant |= needed
        if bool(left.any()):
            why = look.why(i, problem, channels, left)
            result.readers[i].take(positions[left], look.here(i).level[left], why)


def _agree(readers: list[ReaderFold]) -> bool:
    """Whether the uses of one weight need the same of it."""
    first = readers[0].columns
    return all(
        each.columns.keys() == first.keys()
        and all(
            torch.equal(positions, first[carrier][0])
            and torch.allclose(multiple, first[carrier][1], rtol=1e-9, atol=1e-12)
            for carrier, (positions, multiple) in each.columns.items()
        )
        for each in readers[1:]
    )


def _note(problem: str, seen: Field, channels: Channels, left: Tensor | None = None) -> str:
    """Why a fold is not exact, what is folded instead, and how far that is from what is there."""
    off = float((seen.off if left is None else seen.off[left]).max())
    if off == 0:
        return problem
    folded = "the value in the middle" if seen.middle else "the mean"
    cure = "" if channels.graph.gate_names() else "; gates leave no constants (pf.add_gates)"
    share = f"by up to {off / seen.largest:.0%} of the largest constant"
    return f"{problem}, {share}: {folded} is folded{cure}"


class Sinks:
    """Where the constants added to each call's output go.

    A norm that alone reads the output, untouched, takes them into its running mean: a bias there
    would be cancelled in training. Else the bias takes them, created if torch's layer has none.
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self._model, self._channels = model, channels
        self._tensors = tensors_of_model(model)
        self._calls = channels.graph.projections
        self._names = [self._find(i, call) for i, call in enumerate(self._calls)]

    def _find(self, index: int, call: ProjectionCall) -> tuple[str | None, bool]:
        """The tensor's name (None: the norm behind cancels it), and whether it is lost."""
        norm = self._channels.sole_norm(index)
        if norm is not None:
            return norm.mean, False
        if call.bias is not None:
            return call.bias, False
        owner, _, attribute = call.weight.rpartition(".")
        if plain_type(self._model.get_submodule(owner)) in WITH_BIAS and attribute == "weight":
            return f"{owner}.bias".lstrip("."), False
        return None, True

    def name(self, index: int) -> str | None:
        """The tensor that takes up what is added to this call's output."""
        return self._names[index][0]

    def lost(self, index: int) -> bool:
        """Whether nothing can take it up."""
        return self._names[index][1]

    def calls_of_weight(self, index: int) -> list[int]:
        """The eval-mode calls of the same weight."""
        weight = self._calls[index].weight
        return [i for i, c in enumerate(self._calls) if c.weight == weight and c.counted]

    def settle(self, result: Fold) -> None:
        """Where calls that share a sink would add different constants, fold their mean."""
        users: dict[str, list[int]] = {}
        for i, call in enumerate(self._calls):
            name = self.name(i)
            if name is not None and call.counted:
                users.setdefault(name, []).append(i)
        for name in {r.sink for r in result.readers.values() if r.adds and r.sink}:
            if len(users[name]) == 1:
                continue
            result.lasting = False
            shifts = [self._shift(result, i) for i in users[name]]
            mean = torch.stack(shifts).mean(0)
            if all(torch.allclose(shift, mean, rtol=1e-12, atol=0) for shift in shifts):
                continue
            for i in users[name]:
                reader = result.readers.setdefault(i, ReaderFold(self._calls[i].weight, name))
                reader.shift = mean
                reader.note = f"shares {name} with a call that reads other constants: their mean"

    def _shift(self, result: Fold, index: int) -> Tensor:
        call, reader = self._calls[index], result.readers.get(index)
        if reader is None or not reader.adds:
            return torch.zeros(call.outputs.numel(), dtype=torch.float64, device="cpu")
        return shift_of(call, self._tensors[call.weight], reader)


#: Torch's layers whose forward adds `self.bias` unless it is None.
WITH_BIAS = (nn.Linear, *CONVS, *TRANSPOSED)


def check_fold(fold: str) -> None:
    """Raise ArgumentError unless this is what can become of removed channels' constants."""
    if fold not in FOLDS:
        raise ArgumentError(f"fold={fold!r}: choose one of {', '.join(map(repr, FOLDS))}")
