"""The share of MACs that goes with given channels: counted and looked up, or by a selection."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..folding.carriers import carriers
from ..folding.replay import Fold
from ..folding.visibility import HIDDEN, UNKNOWN, VISIBLE, Answers, leaks, ranges, visibility
from ..inputs import Inputs
from ..scaling.factors import ScalingFactors
from ..tracing.classes import Channels
from ..tracing.graph import PIN, ProjectionCall
from .costs import Costs, Latencies
from .limits import Limits, bound_of
from .selection import Chooser, Selection
from .thresholds import magnitudes

#: One side of a call: `fixed` channels, and (multiple, row) for each layer with a share in it.
_Side = tuple[int, tuple[tuple[int, int], ...]]
#: Regimes are kept up to this number.
LARGEST = 256
#: What a β says where only positive constants get through, as behind a ReLU.
POSITIVE: Answers = (0, 0, 0, VISIBLE, VISIBLE)


@dataclass(frozen=True, eq=False)
class Moment:
    """What decides at one moment which channels go.

    Attributes:
        scales: γ.
        betas: name -> β [C] of each of `CutCounter.readers`.
        limits: name -> threshold; None removes nothing.
        compared: what is compared with the thresholds: name -> float [C] on the CPU; None for γ as
            they are, none of them negative.
        roughly: where constant channels take a pass through the network, as of coupled channels,
            guess them from the signs of β.
        joined: what was put together from these, but for the limits, for moments made from this one
            with other limits (`replace(moment, limits=...)`).
    """

    scales: ScalingFactors
    betas: Mapping[str, Tensor]
    limits: Mapping[str, float | None]
    compared: Mapping[str, Tensor] | None = None
    roughly: bool = False
    joined: dict[object, Tensor] = field(default_factory=dict)

    def magnitudes(self) -> Mapping[str, Tensor]:
        """What is compared with the thresholds: name -> float [C] on the CPU."""
        return magnitudes(self.scales) if self.compared is None else self.compared

    def join(self, key: object, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """All of these, 1-D; put together once for each key."""
        if key not in self.joined:
            self.joined[key] = torch.cat([tensors[name].detach() for name in names])
        return self.joined[key]


@dataclass(frozen=True, eq=False)
class _Regime:
    """What follows from some layers' being emptied.

    Attributes:
        dropped: rows of the layers that go with them, and theirs: nothing reads them any more.
        rows: layers that may need a constant channel.
        answers: for each of these, what a removed channel's β says.
        positive: whether that is always: a constant channel, if β > 0.
    """

    dropped: frozenset[int]
    rows: tuple[int, ...]
    answers: tuple[Answers, ...]
    positive: bool


class CutCounter:
    """The share of MACs that is cut by removing what is not over a layer's threshold.

    Where that is enough, it counts channels over their thresholds and looks the MACs up; otherwise
    it goes the way that `plan` goes.

    Args:
        model: the network, not wrapped.
        channels: its channel classes.
        inputs: what to run it on.
        names: layers that may lose channels.
        fold: as in `plan`.
        limits: of these layers.
        of, latency: as in `CutPredictor`.

    Attributes:
        macs_before: multiply-accumulates of the whole network on the inputs.
        quick: whether MACs can be looked up at all.
        guesses: whether a rough prediction may be another one.
        readers: γ name -> name of its β, for layers that may need a constant channel.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        inputs: Inputs,
        names: Sequence[str],
        *,
        fold: str,
        limits: Limits,
        of: str = "macs",
        latency: Latencies | None = None,
    ) -> None:
        self._channels = channels
        self._chooser = Chooser(model, channels, inputs, names, fold, limits)
        self._unlimited = self._chooser.under(Limits.of(dict.fromkeys(names, 1)))
        costs, everything = Costs(model, channels, latency), ~channels.graph.mask()
        self._cost = costs.one(of)
        self._before = self._cost(everything)
        self._names = list(names)
        self._sizes = [channels.layers[name].numel() for name in names]
        sizes = torch.tensor(self._sizes, device="cpu")
        self._rows = torch.arange(len(names), device="cpu").repeat_interleave(sizes)
        self._last = sizes.cumsum(0) - 1  # place of each layer's last channel
        self._seen = visibility(model, channels, self._names, inputs, fold)
        biases = {name: channels.calls[name].bias for name in self._seen.readers}
        self.readers = {name: bias for name, bias in biases.items() if bias is not None}
        self.macs_before = costs.macs(everything)
        self._shared = shares_channels(channels, self._names) or bool(channels.balanced)
        limited = not limits.none or min(self._sizes) < 2
        self.guesses = self._shared and bool(self.readers)
        self._widths = Widths(channels, self._names)
        self.quick = of == "macs" and self._widths.known and not (self._shared or limited)
        # Emptied layers, strongest first -> what follows; holds for good.
        self._regimes: dict[tuple[int, ...], _Regime | None] = {}
        self._tables: dict[tuple[_Regime, torch.device], tuple[Tensor, Tensor]] = {}

    def share(self, moment: Moment) -> float:
        """The share of MACs cut."""
        if not self.quick:
            return self._by_selection(moment)
        compared = moment.magnitudes()
        limits = [bound_of(moment.limits[name]) for name in self._names]
        bounds = torch.tensor(limits, device="cpu")
        values = moment.join("all", compared, self._names)
        above = values > bounds.index_select(0, self._rows)
        ends = above.cumsum(0).index_select(0, self._last).tolist()
        return self.share_of(moment, [end - start for start, end in pairwise([0, *ends])])

    def share_of(self, moment: Moment, kept: Sequence[int]) -> float:
        """As `share`, from the channels over the threshold in each layer."""
        empty = tuple(row for row, count in enumerate(kept) if count == 0)
        if empty:
            compared = moment.magnitudes()
            if moment.compared is None:
                moment = replace(moment, compared=compared, joined={})
            strength = {row: float(compared[self._names[row]].max()) for row in empty}
            empty = tuple(sorted(empty, key=lambda row: -strength[row]))
        try:
            regime = self._regimes[empty]
        except KeyError:
            if len(self._regimes) >= LARGEST:  # another thread may ask, too
                self._regimes.clear()
                self._tables.clear()
            regime = self._regimes[empty] = self._find_regime(empty)
        extra = None if regime is None else self._extra(regime, moment, kept)
        if regime is None or extra is None:
            return self._by_selection(moment)
        widths = [0 if row in regime.dropped else count for row, count in enumerate(kept)]
        for row in extra:
            widths[row] += 1
        return 1.0 - self._widths.macs(widths) / self.macs_before

    def stays(self, row: int) -> bool:
        """Whether this layer cannot be emptied, even if all others stay whole."""
        return self._find_regime((row,)) is None

    def leaks(self) -> dict[str, tuple[str, ...]]:
        """As `CutPredictor.leaks`."""
        chooser = self._chooser
        return leaks(chooser.model, self._channels, self._names, chooser.inputs, chooser.fold)

    def check_needs_no_pass(self) -> None:
        """Raise ArgumentError if `_constants` may have to pass inputs through the network."""
        answers = [self._seen.answers(name) for name in self._seen.readers]
        if answers and (self._shared or any(UNKNOWN in each for each in answers)):
            raise ArgumentError(
                "the share of MACs that pruning cuts cannot be predicted while this model is "
                "sharded: whether removed channels leave a constant behind takes passes through "
                "the whole network (coupled or grouped channels, or activations such as "
                "hardswish); use fold='bias', or DistributedDataParallel"
            )

    # --- the quick way

    def _extra(self, regime: _Regime, moment: Moment, kept: Sequence[int]) -> list[int] | None:
        """Rows of the layers that need a constant channel; None: β alone do not tell."""
        names = [self._names[row] for row in regime.rows]
        if not names or all(kept[row] == self._sizes[row] for row in regime.rows):
            return []
        compared = moment.scales if moment.compared is None else moment.compared
        score = moment.join(regime, compared, names)
        rows, table = self._table(regime, score.device)
        bounds = [
            float("inf") if row in regime.dropped else bound_of(moment.limits[self._names[row]])
            for row in regime.rows
        ]
        gone = score <= score.new_tensor(bounds).index_select(0, rows)
        beta = moment.join((regime, "β"), moment.betas, names).to(score.device)
        if regime.positive:
            shows = torch.bincount(rows[gone & (beta > 0)], minlength=len(names)).tolist()
            return [row for row, count in zip(regime.rows, shows, strict=True) if count]
        answer = table[rows, ranges(beta)]
        shows = torch.bincount(rows[gone & (answer == VISIBLE)], minlength=len(names)).tolist()
        doubts = torch.bincount(rows[gone & (answer == UNKNOWN)], minlength=len(names)).tolist()
        if any(doubt and not show for show, doubt in zip(shows, doubts, strict=True)):
            return None
        return [row for row, count in zip(regime.rows, shows, strict=True) if count]

    def _table(self, regime: _Regime, device: torch.device) -> tuple[Tensor, Tensor]:
        """Index into `regime.rows` of each of these layers' channels; their answers [rows, 5]."""
        key = (regime, device)
        table = self._tables.get(key)
        if table is None:
            sizes = torch.tensor([self._sizes[row] for row in regime.rows], device="cpu")
            rows = torch.arange(len(regime.rows), device="cpu").repeat_interleave(sizes)
            table = rows.to(device), torch.tensor(regime.answers, device=device)
            self._tables[key] = table
        return table

    # --- prepared once

    def _find_regime(self, empty: tuple[int, ...]) -> _Regime | None:
        """What follows when these layers (strongest first) are emptied and the others lose nothing;
        None where one of them is given a channel back.
        """
        strength = {self._names[row]: 1.0 / (2 + rank) for rank, row in enumerate(empty)}
        compared = {
            name: full(size, strength.get(name, 2.0))
            for name, size in zip(self._names, self._sizes, strict=True)
        }
        limits = dict.fromkeys(self._names, 1.0)
        choice, _ = self._unlimited.choose(compared, limits, lambda choice: Fold())
        counts = [choice.count(name) for name in self._names]
        if any(counts[row] for row in empty):
            return None
        reading = self._reading(choice.alive())
        rows, answers = [], []
        for row, name in enumerate(self._names):
            answer = self._seen.answers(name, reading)
            if any(answer):
                rows.append(row)
                answers.append(answer)
        dropped = frozenset(row for row, count in enumerate(counts) if count == 0)
        positive = all(answer == POSITIVE for answer in answers)
        return _Regime(dropped, tuple(rows), tuple(answers), positive)

    # --- the way of `plan`

    def _by_selection(self, moment: Moment) -> float:
        choice, folded = self._chooser.choose(
            moment.magnitudes(),
            moment.limits,
            lambda choice: self._constants(choice, moment),
        )
        return 1.0 - self._cost(choice.staying(folded.constant)) / (self._before or 1.0)

    def _constants(self, choice: Selection, moment: Moment) -> Fold:
        """What `fold_constants` would find, of which the constant channels are enough here."""
        reading = self._reading(choice.alive())
        constant: set[int] = set()
        sets: set[int] = set()
        for name in self._seen.readers:
            labels = choice.layers[name]
            gone = ~choice.stays[labels]
            if not bool(gone.any()):
                continue
            answers = torch.tensor(self._seen.answers(name, reading), device="cpu")
            found = answers[ranges(moment.betas[name].detach().cpu())[gone]]
            if self._shared and moment.roughly:
                sets |= set(self._sets[labels[gone][found != HIDDEN]].tolist()) - {-1}
            elif self._shared or (bool((found == UNKNOWN).any()) and VISIBLE not in found):
                return self._chooser.constants(choice)
            elif VISIBLE in found:
                constant.add(int(labels[gone].min()))
        for each in sets:  # one channel stands for all of a set
            constant.add(int(((self._sets == each) & ~choice.stays).nonzero()[0]))
        return Fold(constant=constant)

    @functools.cached_property
    def _sets(self) -> Tensor:
        """int64 [graph.count]: the set of classes that one constant channel can stand for; −1."""
        found = torch.full((self._channels.graph.count,), -1, dtype=torch.long, device="cpu")
        for label, carrier in carriers(self._channels, self._channels.graph.mask()).items():
            found[label] = carrier
        return found

    def _reading(self, alive: Tensor) -> set[int]:
        calls = enumerate(self._channels.graph.projections)
        return {i for i, call in calls if not call.depthwise and bool(alive[call.outputs].any())}


def full(size: int, value: float) -> Tensor:
    """Scores of a layer that are all the same."""
    return torch.full((size,), value, dtype=torch.float32, device="cpu")


def shares_channels(channels: Channels, names: Sequence[str]) -> bool:
    """Whether one of these layers shares channels with another layer, or has some that must
    stay.
    """
    users = torch.zeros(channels.graph.count, dtype=torch.long, device="cpu")
    for labels in channels.layers.values():
        users += torch.bincount(labels, minlength=users.numel())
    mine = [channels.layers[name] for name in names]
    return any(bool(((users[labels] != 1) | (labels == PIN)).any()) for labels in mine)


class Widths:
    """Multiply-accumulates from the number of channels in each layer alone, for `CutPredictor`:
    what `Costs` counts by class, in a fraction of the time (benchmarks/bench_prediction.py).

    Attributes:
        known: whether the channels of each layer are all read and written alike; if not, widths do
            not tell.
    """

    def __init__(self, channels: Channels, names: Sequence[str]) -> None:
        self._fixed = channels.graph.fixed_macs
        self._calls: list[tuple[ProjectionCall, _Side, _Side]] = []
        self.known = True
        for call in channels.graph.projections:
            if not call.counted:
                continue
            sides = [_side(channels, names, ids) for ids in (call.inputs, call.outputs)]
            if None in sides:
                self.known = False
            else:
                self._calls.append((call, *sides))  # type: ignore[arg-type]

    def macs(self, widths: Sequence[int]) -> int:
        """MACs with so many channels in each layer."""
        total = self._fixed
        for call, (n_in, readers), (n_out, writers) in self._calls:
            for multiple, row in readers:
                n_in += multiple * widths[row]
            for multiple, row in writers:
                n_out += multiple * widths[row]
            total += call.macs(n_in, n_out)
        return total


def _side(channels: Channels, names: Sequence[str], ids: Tensor) -> _Side | None:
    """None where the channels of one layer are not read alike."""
    times = torch.bincount(channels.label[ids], minlength=channels.graph.count)
    terms, fixed = [], ids.numel()
    for row, name in enumerate(names):
        each = times[channels.layers[name]]
        multiple = int(each[0])
        if bool((each != multiple).any()):
            return None
        if multiple:
            terms.append((multiple, row))
            fixed -= multiple * each.numel()
    return fixed, tuple(terms)
