"""The share of MACs that a plan made now would cut, from γ and β alone: `CutPredictor`."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..folding.carriers import carriers
from ..folding.fold import check_fold
from ..folding.replay import Fold
from ..folding.visibility import HIDDEN, UNKNOWN, VISIBLE, Answers, leaks, ranges, visibility
from ..inputs import Inputs, unwrap
from ..scaling.factors import ScalingFactors
from ..sharding import is_sharded, present_parameters, whole
from ..tracing.classes import Channels, trace_channels
from ..tracing.graph import PIN, ProjectionCall
from ..tracing.meaning import inputs_of
from .costs import Costs, Latencies, check_of, whole_steps
from .limits import Counts, Limits, Shares, bound_of
from .plan import check_belongs, check_scales
from .selection import Chooser, Selection
from .thresholds import as_factors, check_any, check_method, magnitudes, thresholds, valleys

#: One side of a call: `fixed` channels, and (multiple, row) for each layer with a share in it.
_Side = tuple[int, tuple[tuple[int, int], ...]]
#: Regimes are kept up to this number.
LARGEST = 256
#: What a β says where only positive constants get through, as behind a ReLU.
POSITIVE: Answers = (0, 0, 0, VISIBLE, VISIBLE)


class CutPredictor:
    """Predicts `plan(...).flops_reduction`, or the share of another cost, from the γ of the moment,
    without tracing again.

    The network is traced once. `cut()` then counts channels over their thresholds and looks the
    MACs up: about 0.1 ms for a ResNet-20, 0.2 ms for a ResNet-50 on one core. It counts constant
    channels, too, from the sign of β. Where the answer is not that simple (coupled
    channels, limits, a layer that has to be given a channel back) it goes the
    way that `plan` goes, in milliseconds.

    Args:
        model, example_inputs, scales, method, round_to, min_channels, max_share, value, fold,
            latency: as in `plan`.
        of: what the share is of: "macs", "params" (without the biases that constants may call for)
            or "latency". The latter two take milliseconds.

    Attributes:
        macs_before: multiply-accumulates of the whole network on the example inputs.
        model: the network, its wrappers left out.

    Raises:
        ArgumentError, PlanError, TracingError: as in `plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        scales: ScalingFactors,
        method: str = "valley",
        *,
        value: float | None = None,
        fold: str = "exact",
        round_to: Counts = 1,
        min_channels: Counts = 1,
        max_share: Shares | None = None,
        of: str = "macs",
        latency: Latencies | None = None,
    ) -> None:
        check_scales("pf.CutPredictor", scales)
        check_of(of, latency)
        if latency is not None:
            latency.check_inputs(example_inputs)
            round_to = whole_steps(round_to, latency)
        check_fold(fold)
        check_any(scales)
        sizes = {name: gamma.numel() for name, gamma in scales.items()}
        limits = Limits.of(sizes, round_to, min_channels, max_share)
        self.scales, self.method, self.value, self.fold = scales, method, value, fold
        self.model = unwrap(model)
        channels = trace_channels(
            self.model, example_inputs, scales.residual, with_operations=latency is not None
        )
        check_belongs(self.model, channels, scales)
        check_method(method, value)  # and no γ: what they are now may be clamped before a look
        self._names = list(scales)
        self._sizes = [scales[name].numel() for name in scales]
        self._counter = CutCounter(
            self.model,
            channels,
            inputs_of(self.model, example_inputs),
            self._names,
            fold=fold,
            limits=limits,
            of=of,
            latency=latency,
        )
        self.of = of
        self.macs_before = self._counter.macs_before
        params: dict[str, Tensor] = dict(self.model.named_parameters())
        self._beta = {name: params[bias] for name, bias in self._counter.readers.items()}
        self._beta_now: Mapping[str, Tensor] = self._beta  # sharded ones as they were last gathered

    def cut(self, scores: Mapping[str, Tensor] | None = None) -> float:
        """The share of MACs (or of `of`) that a plan made now would cut.

        Args:
            scores: as in `plan`; by default, |γ| decides.

        Raises:
            ArgumentError: `scores` do not fit.
            ThresholdError: as in `thresholds`.
        """
        first = next(iter(self.scales.values()))
        if scores is None and self.method == "valley" and self._counter.quick and _plain(first):
            found = valleys(self.scales)
            limits = {name: threshold for name, (threshold, _) in found.items()}
            moment = Moment(self.scales, self._beta_now, limits)
            return self._counter.share_of(moment, [above for _, above in found.values()])
        compared = self.look(scores)
        factors = self.scales if scores is None and _plain(first) else as_factors(compared)
        return self._compare(compared, thresholds(factors, self.method, self.value))

    def rebind(self, scales: ScalingFactors) -> None:
        """Follow parameters that were replaced in the same model since, as `fully_shard` and
        `load_state_dict(assign=True)` do. Once they are sharded, all processes must rebind and
        predict together.

        Args:
            scales: `scales.rebind(model)`; those left out by `select` may be missing.

        Raises:
            ArgumentError: a factor is missing, or is no parameter of this model; or the prediction
                takes passes through the network, which is now sharded.
        """
        known = {**scales.others, **scales}
        for name in self._names:
            if name not in known:
                raise ArgumentError(f"scales lack {name!r}, which is predicted to be pruned too")
        if all(known[name] is self.scales[name] for name in self._names):
            return
        present = present_parameters(self.model)
        for name in self._names:
            if present.get(name) is not known[name]:
                raise ArgumentError(
                    f"{name!r} is no parameter of the model that this prediction was made for: "
                    "make it anew, from the model that is trained (before it is sharded)"
                )
        if any(is_sharded(known[name]) for name in self._names):
            self._counter.check_needs_no_pass()
        self.scales = ScalingFactors(
            {name: known[name] for name in self._names}, residual=self.scales.residual
        )
        self._beta = {name: present[bias] for name, bias in self._counter.readers.items()}
        self.look()  # sharded β made whole, for predictions from other numbers than γ

    def leaks(self) -> dict[str, tuple[str, ...]]:
        """Layers whose removed channels leave something behind that does not fold exactly: γ name
        -> names of the vectors that it comes from; see `folding.visibility.leaks`.
        """
        return self._counter.leaks()

    def watched(self) -> dict[str, Tensor]:
        """The parameters that a prediction reads, γ and β, by name."""
        return {
            **self.scales,
            **{self._counter.readers[name]: beta for name, beta in self._beta.items()},
        }

    def look(self, scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What is compared with thresholds: name -> float32 [C] on the CPU, for `cut_of` and
        `count_for`. Sharded γ and β are gathered, in one collective.

        Args:
            scores: as in `plan`; by default, |γ| decides.
        """
        gammas = {} if scores is not None else {n: g.detach() for n, g in self.scales.items()}
        betas = {self._counter.readers[name]: beta.detach() for name, beta in self._beta.items()}
        if any(map(is_sharded, self.scales.values())):
            found = whole({**gammas, **betas})
            gammas = {name: found[name] for name in gammas}
            betas = {name: found[name] for name in betas}
        self._beta_now = {name: betas[bias] for name, bias in self._counter.readers.items()}
        return magnitudes(gammas if scores is None else self.scales, scores)

    @property
    def guesses(self) -> bool:
        """Whether a rough prediction may be another one than that which takes milliseconds more."""
        return self._counter.guesses

    def cut_of(self, compared: Mapping[str, Tensor], roughly: bool = False) -> float:
        """As `cut`, from what `look` found.

        Args:
            roughly: where only a pass through the network tells whether removed channels leave a
                constant behind (coupled channels), guess it from the signs of β.
        """
        limits = thresholds(as_factors(compared), self.method, self.value)
        return self._compare(compared, limits, roughly)

    def count_for(
        self,
        cut: float,
        compared: Mapping[str, Tensor],
        usual: int = 0,
        slack: float = 0.0,
        held: Mapping[str, float | None] = MappingProxyType({}),
        order: Tensor | None = None,
    ) -> int:
        """How many of the weakest channels must go for the share of MACs closest to `cut`, roughly
        (as in `cut_of`).

        Args:
            cut: share of MACs.
            compared: name -> float [C] on the CPU, what channels are ranked by; those at infinity
                stay.
            usual: the answer if it is not worse than the best by more than `slack`.
            held: name -> threshold of layers that are not ranked with the others.
            order: `compared` of the layers that are ranked, 1-D and sorted, if that is at hand.
        """
        if order is None:
            ranked = [values for name, values in compared.items() if name not in held]
            order = torch.cat(ranked).sort().values
        share = self._shares(compared, order, held)
        if usual and abs(share(usual) - cut) <= slack:
            return usual  # whatever the best may be
        low, high = 0, max(int(order.isfinite().sum()) - 1, 0)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) < cut else (low, middle)
        best = min(abs(share(low) - cut), abs(share(high) - cut))
        if usual and abs(share(usual) - cut) <= best + slack:
            return usual
        return low if abs(share(low) - cut) == best else high

    def _shares(
        self, compared: Mapping[str, Tensor], order: Tensor, held: Mapping[str, float | None]
    ) -> Callable[[int], float]:
        """The share of MACs cut as a function of how many of the weakest channels go, roughly."""
        moment = Moment(self.scales, self._beta_now, held, compared, roughly=True)

        @functools.cache
        def share(count: int) -> float:
            limit = float(order[count - 1]) if count else None
            limits = {**dict.fromkeys(self._names, limit), **held}
            return self._counter.share(replace(moment, limits=limits))

        return share

    def largest_cut(self, names: Collection[str] | None = None) -> float:
        """The share that is cut when every layer is cut as far as it can be; of the time, the
        largest of those on the way there.

        Args:
            names: of layers, if only these are cut.
        """
        parts = [0.0] if self.of != "latency" else [part / 8 for part in range(8)]
        return max(0.0, *(self._cut_to(part, names) for part in parts))

    def _cut_to(self, part: float, names: Collection[str] | None) -> float:
        """The share that is cut when this part of each layer stays."""
        left = {}
        for name, size in zip(self._names, self._sizes, strict=True):
            whole_layer = names is not None and name not in names
            left[name] = _full(size, 1.0 if whole_layer else 0.0)
            left[name][: math.ceil(part * size)] = 1.0
        return self._compare(left, dict.fromkeys(self._names, 0.0))

    def layers_that_stay(self) -> set[int]:
        """Rows of the layers that cannot be emptied, even if all others stay whole."""
        return {row for row in range(len(self._names)) if self._counter.stays(row)}

    def _compare(
        self,
        compared: Mapping[str, Tensor],
        limits: Mapping[str, float | None],
        roughly: bool = False,
    ) -> float:
        return self._counter.share(Moment(self.scales, self._beta_now, limits, compared, roughly))


def _plain(gamma: Tensor) -> bool:
    """Whether γ are compared as they are: not sharded, and not in more than single precision."""
    return gamma.dtype != torch.float64 and not is_sharded(gamma)


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
            name: _full(size, strength.get(name, 2.0))
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


def _full(size: int, value: float) -> Tensor:
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
