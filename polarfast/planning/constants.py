"""Which removed channels will call for a constant channel, found out once for a network.

A layer that loses channels needs a constant channel iff the constant of one of them, act(β), is not
zero where a reader cannot take it up as a bias (docstring of `folding`). Whether a reader can is a
matter of structure; whether act(β) is zero depends on where β lies. Both are read off one fold of a
copy whose β are put there on purpose, so that a later prediction needs to look at β alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..copies import doubled
from ..folding.carriers import carriers
from ..folding.fold import fold_constants, new_biases
from ..folding.replay import Fold
from ..inputs import Spec
from ..tracing.classes import Channels
from ..tracing.graph import PIN
from .selection import Chooser, Selection

HIDDEN, VISIBLE, UNKNOWN = 0, 1, 2
#: β is sorted into (-inf, -1), [-1, 0), {0}, (0, 1], (1, inf).
FAR_BELOW, BELOW, ZERO, ABOVE, FAR_ABOVE = range(5)
#: Ranges that β are drawn from, for each of these.
PROBES = ((-12.0, -8.0), (-0.9, -0.1), (0.0, 0.0), (0.1, 0.9), (8.0, 12.0))
Answers = tuple[int, ...]  # HIDDEN, VISIBLE or UNKNOWN for each range of β


@dataclass
class Visibility:
    """Where constants of removed channels show.

    Attributes:
        readers: γ name -> index of a reader in `graph.projections` -> whether a removed channel
            calls for a constant channel there, by the range of its β. Layers that never need one
            are left out.
    """

    readers: dict[str, dict[int, Answers]] = field(default_factory=dict)

    def answers(self, name: str, reading: set[int] | None = None) -> Answers:
        """A layer's answers, over all readers or those in `reading`."""
        found = [
            answers
            for reader, answers in self.readers.get(name, {}).items()
            if reading is None or reader in reading
        ]
        each = [{answers[i] for answers in found} for i in range(len(PROBES))]
        return tuple(
            VISIBLE if VISIBLE in seen else UNKNOWN if UNKNOWN in seen else HIDDEN for seen in each
        )


def visibility(
    model: nn.Module, channels: Channels, names: Iterable[str], spec: Spec, fold: str
) -> Visibility:
    """Find out which layers need constant channels.

    Args:
        model: the network; left as it is.
        channels: its channel classes.
        names: layers that may lose channels.
        spec: description of the inputs.
        fold: as in `plan`.
    """
    layers = {name: channels.layers[name] for name in names}
    seen: dict[str, dict[int, set[int]]] = {}
    if fold != "bias":  # there, no constant is ever carried by a channel
        narrowest = min(int((labels != PIN).sum()) for labels in layers.values())
        for turn in range(-(-len(PROBES) // max(narrowest - 1, 1))):
            _look(model, channels, layers, spec, fold, turn * max(narrowest - 1, 1), seen)
    result = Visibility()
    for name, by_reader in seen.items():
        result.readers[name] = {i: _answers(probes, fold) for i, probes in by_reader.items()}
    return result


def _answers(probes: set[int], fold: str) -> Answers:
    at = [VISIBLE if i in probes else HIDDEN for i in range(len(PROBES))]
    if fold == "none":  # β is dropped first
        return (at[ZERO],) * len(PROBES)
    if at[FAR_BELOW] != at[BELOW]:  # an edge somewhere between, as hardswish has at -3
        at[FAR_BELOW] = UNKNOWN
    if at[FAR_ABOVE] != at[ABOVE]:
        at[FAR_ABOVE] = UNKNOWN
    return tuple(at)


def _look(
    model: nn.Module,
    channels: Channels,
    layers: dict[str, Tensor],
    spec: Spec,
    fold: str,
    offset: int,
    seen: dict[str, dict[int, set[int]]],
) -> None:
    """One fold in which every layer keeps its last channel and the β of the others are spread over
    the ranges; adds to `seen` which ranges show at which reader.
    """
    choice = Selection(channels, layers)
    for labels in layers.values():
        choice.stays[labels] = False
    for labels in layers.values():
        free = labels[labels != PIN]
        choice.stays[free[-1]] = True
    choice.stays[PIN] = True
    probed = _spread(model, channels, layers, offset)
    folded = fold_constants(probed, channels, choice.kept(), choice.alive(), spec, fold)
    place = {
        int(label): (name, k)
        for name, labels in layers.items()
        for k, label in enumerate(labels.tolist())
        if label != PIN
    }
    for i, reader in folded.readers.items():
        inputs = channels.graph.projections[i].inputs
        for positions, multiple in reader.columns.values():
            for label in channels.label[inputs[positions[multiple != 0]]].tolist():
                name, k = place[label]
                seen.setdefault(name, {}).setdefault(i, set()).add((k + offset) % len(PROBES))


@torch.no_grad()
def _spread(
    model: nn.Module, channels: Channels, layers: dict[str, Tensor], offset: int
) -> nn.Module:
    """A float64 copy with the β of `layers` spread over the ranges, and the other norms random: in
    a fresh network they are all alike, which would make constants proportional by accident.
    """
    copy, tensors = doubled(model)
    generator = torch.Generator("cpu").manual_seed(0)
    low, high = torch.tensor(PROBES, dtype=torch.float64, device="cpu").unbind(1)
    for name, call in channels.calls.items():
        width = call.inputs.numel()
        draw = torch.rand(3, width, generator=generator, dtype=torch.float64, device="cpu")
        tensors[name].copy_(0.5 + 0.5 * draw[0])
        if call.mean is not None:
            tensors[call.mean].copy_(draw[1] - 0.5)
        if call.bias is not None:
            turn = (torch.arange(width, device="cpu") + offset) % len(PROBES)
            spread = low[turn] + (high - low)[turn] * draw[2]
            tensors[call.bias].copy_(spread if name in layers else 2 * draw[2] - 1)
    return copy.double()


def ranges(beta: Tensor) -> Tensor:
    """The range of each β, int64."""
    return (beta >= -1).long() + (beta >= 0) + (beta > 0) + (beta > 1)


class Foresight:
    """Which constant channels a selection will call for.

    Removed channels that one constant channel can stand for are a set. Until the network has been
    run, a guess that is right behind ReLU: a set needs its constant channel if a channel of it with
    β > 0 is read by a convolution with zero padding. From then on it is taken to need one whenever
    it did when it was last looked at.
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self._channels = chooser, chooser.channels
        graph = self._channels.graph
        self._set = torch.full((graph.count,), -1, dtype=torch.long, device="cpu")  # by class
        carrier_of = carriers(self._channels, graph.mask())
        self._set[list(carrier_of)] = torch.tensor(
            list(carrier_of.values()), dtype=torch.long, device="cpu"
        )
        self._shows = self._guess() if chooser.fold == "exact" else graph.mask()
        self._looked_at, self._needed = graph.mask(), graph.mask()  # by set
        self._biased: list[Tensor] = []  # classes of the channels of each created bias

    def _guess(self) -> Tensor:
        """bool [graph.count]: classes that are taken to need a constant channel."""
        channels, label = self._channels, self._channels.label
        padded = channels.graph.mask()
        for call in channels.graph.projections:
            if call.padded and not call.depthwise:
                padded[label[call.inputs]] = True
        positive = channels.graph.mask()
        params = dict(self._chooser.model.named_parameters())
        for name, labels in channels.layers.items():
            norm = channels.calls[name]
            if norm.gate is None and norm.bias is not None:
                positive[labels[(params[norm.bias].detach() > 0).cpu()]] = True
        return padded & positive

    def constants(self, choice: Selection) -> Fold:
        """What running the network is expected to find, of which the classes of constant channels
        are enough here.
        """
        gone = (~choice.stays & (self._set >= 0)).nonzero().flatten()
        sets = self._set[gone]
        first = torch.full_like(self._set, self._set.numel())
        first.scatter_reduce_(0, sets, gone, "amin")
        shows, broken = self._channels.graph.mask(), self._channels.graph.mask()
        shows[sets[self._shows[gone]]] = True
        broken[sets] = True
        needed = broken & torch.where(self._looked_at, self._needed, shows)
        return Fold(constant=set(first[needed].tolist()))

    def learn(self, choice: Selection, folded: Fold) -> bool:
        """Remember what a run of the network found; whether it was something else than expected."""
        expected, found = (
            set(self._set[list(fold.constant)].tolist())
            for fold in (self.constants(choice), folded)
        )
        gone = self._set[~choice.stays]
        self._looked_at[gone[gone >= 0]] = True
        self._needed[gone[gone >= 0]] = False
        self._needed[list(found)] = True
        before, self._biased = self._biased, self._created(folded)
        same = len(before) == len(self._biased) and all(map(torch.equal, before, self._biased))
        return expected != found or not same

    def _created(self, folded: Fold) -> list[Tensor]:
        channels = self._channels
        created = new_biases(self._chooser.model, channels, folded, ~channels.graph.mask())
        outputs = {
            reader.sink: channels.graph.projections[index].outputs
            for index, reader in folded.readers.items()
        }
        return [channels.label[outputs[name]] for name in sorted(created)]

    def new_biases(self) -> list[Tensor]:
        """For each bias that the constants will create, the classes of its channels."""
        return self._biased
