"""Which removed channels will call for a constant channel, foretold from a run of the network in
which nearly all are removed: for callers that weigh many choices and cannot run it for each.

A layer that loses channels needs a constant channel iff the constant of one of them, act(β), is not
zero where a reader cannot take it up as a bias (docstring of `fold`). Whether a reader can is a
matter of structure; whether act(β) is zero depends on where β lies.

- `Foretold`, for `plan(cut=)`: β are what they are.
- `visibility`, for `CutPredictor`, every few steps of a training in which β change: one fold of a
  copy whose β are put there on purpose, so that a prediction needs to look at β alone
  (benchmarks/bench_prediction.py shows what that saves).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..copies import doubled
from ..inputs import Inputs
from ..tracing.classes import Channels
from ..tracing.graph import PIN
from .carriers import carriers
from .fold import fold_constants

HIDDEN, VISIBLE, UNKNOWN = 0, 1, 2
#: β is sorted into (-inf, -1), [-1, 0), {0}, (0, 1], (1, inf).
FAR_BELOW, BELOW, ZERO, ABOVE, FAR_ABOVE = range(5)
#: Ranges that β are drawn from, for each of these.
PROBES = ((-12.0, -8.0), (-0.9, -0.1), (0.0, 0.0), (0.1, 0.9), (8.0, 12.0))
Answers = tuple[int, ...]  # HIDDEN, VISIBLE or UNKNOWN for each range of β


def shown(
    model: nn.Module, channels: Channels, stays: Tensor, inputs: Inputs, fold: str
) -> dict[int, Tensor]:
    """Run the network without some of its channels: index of a reader in `graph.projections` -> the
    removed classes whose constants take a constant channel there, int64.

    Args:
        stays: bool [graph.count] by class label.
    """
    kept = {name: stays[labels].nonzero().flatten() for name, labels in channels.layers.items()}
    folded = fold_constants(model, channels, kept, stays[channels.label], inputs, fold)
    found: dict[int, Tensor] = {}
    calls = channels.graph.projections
    for i, reader in folded.readers.items():
        carried = [positions[multiple != 0] for positions, multiple in reader.columns.values()]
        if carried:
            found[i] = channels.label[calls[i].inputs[torch.cat(carried)]].unique()
    return found


class Foretold:
    """The constant channels that any choice of channels will call for, with β as they are.

    Args:
        model, channels: the network and its channel classes.
        looks: each bool [graph.count] by class label: next to nothing stays, but something in each
            layer, so that all that is removed has readers. What stays in every look is never found
            to show.
        inputs: what to run it on.
        fold: as in `plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        looks: Iterable[Tensor],
        inputs: Inputs,
        fold: str,
    ) -> None:
        self._channels = channels
        self._shown = [
            found
            for stays in looks
            for found in shown(model, channels, stays, inputs, fold).items()
        ]
        # Removed channels that one constant channel can stand for are a set.
        self._set = torch.full((channels.graph.count,), -1, dtype=torch.long, device="cpu")
        for label, carrier in carriers(channels, channels.graph.mask()).items():
            self._set[label] = carrier

    def constants(self, stays: Tensor) -> set[int]:
        """Classes of constant channels: the first removed one of each set in which one shows to a
        reader that stays.
        """
        label, calls = self._channels.label, self._channels.graph.projections
        needed = torch.zeros_like(stays)
        for i, labels in self._shown:
            if bool(stays[label[calls[i].outputs]].any()):
                needed[self._set[labels[~stays[labels]]]] = True
        gone = (~stays & (self._set >= 0)).nonzero().flatten()
        first = torch.full_like(self._set, self._set.numel())
        first.scatter_reduce_(0, self._set[gone], gone, "amin")
        return set(first[needed].tolist())


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
    model: nn.Module, channels: Channels, names: Iterable[str], inputs: Inputs, fold: str
) -> Visibility:
    """Find out which layers need constant channels.

    Args:
        model: the network; left as it is.
        channels: its channel classes.
        names: layers that may lose channels.
        inputs: what to run it on.
        fold: as in `plan`.
    """
    layers = {name: channels.layers[name] for name in names}
    seen: dict[str, dict[int, set[int]]] = {}
    if fold != "bias":  # there, no constant is ever carried by a channel
        narrowest = min(int((labels != PIN).sum()) for labels in layers.values())
        for turn in range(-(-len(PROBES) // max(narrowest - 1, 1))):
            _look(model, channels, layers, inputs, fold, turn * max(narrowest - 1, 1), seen)
    result = Visibility()
    for name, by_reader in seen.items():
        result.readers[name] = {i: _answers(probes, fold) for i, probes in by_reader.items()}
    return result


def leaks(
    model: nn.Module, channels: Channels, names: Iterable[str], inputs: Inputs, fold: str
) -> dict[str, tuple[str, ...]]:
    """Layers whose removed channels leave constants that some reader cannot take up exactly,
    whatever β are: behind squeeze-excite gates and padded depthwise convolutions.

    Args:
        model, channels, names, inputs, fold: as in `visibility`.

    Returns:
        γ name -> names of the vectors of the same channels, in the same order, that make the
        constants: its β, and β and running mean of norms further on, as of one behind a depthwise
        convolution. With γ they must be 0 for nothing to be left.
    """
    layers = {name: channels.layers[name] for name in names}
    stays = _hardly_any(channels, layers)
    kept = {name: stays[labels].nonzero().flatten() for name, labels in channels.layers.items()}
    probed = _spread(model, channels, layers, 0)
    folded = fold_constants(probed, channels, kept, stays[channels.label], inputs, fold)
    leaking = channels.graph.mask()
    for i, reader in folded.readers.items():
        if reader.note is not None and reader.shifted is not None:
            leaking[channels.label[channels.graph.projections[i].inputs[reader.shifted]]] = True
    found = {}
    for name, labels in layers.items():
        if not bool(leaking[labels].any()):
            continue
        own = channels.calls[name]
        vectors = [] if own.bias is None or own.gate is not None else [own.bias]
        for norm in channels.calls.values():
            if norm is not own and torch.equal(channels.label[norm.inputs], labels):
                vectors += [each for each in (norm.bias, norm.mean) if each is not None]
        found[name] = tuple(vectors)
    return found


def _hardly_any(channels: Channels, layers: Mapping[str, Tensor]) -> Tensor:
    """What stays, by class, where every layer keeps its last channel alone."""
    stays = ~channels.graph.mask()
    stays[torch.cat(list(layers.values()))] = False
    stays[[int(labels[labels != PIN][-1]) for labels in layers.values()]] = True
    stays[PIN] = True
    return stays


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
    inputs: Inputs,
    fold: str,
    offset: int,
    seen: dict[str, dict[int, set[int]]],
) -> None:
    """One fold in which every layer keeps its last channel and the β of the others are spread over
    the ranges; adds to `seen` which ranges show at which reader.
    """
    stays = _hardly_any(channels, layers)
    probed = _spread(model, channels, layers, offset)
    place = {
        int(label): (name, k)
        for name, labels in layers.items()
        for k, label in enumerate(labels.tolist())
        if label != PIN
    }
    for i, labels in shown(probed, channels, stays, inputs, fold).items():
        for label in labels.tolist():
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
