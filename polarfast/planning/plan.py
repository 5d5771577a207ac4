"""`plan`: from thresholds to the channels that stay, and what that saves."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError, PlanError
from ..folding.fold import Folded, check_fold, new_biases
from ..folding.replay import Fold
from ..inputs import misplaced, unwrap
from ..layers import lost_gates
from ..scaling.factors import ScalingFactors
from ..tracing.classes import Channels, Traced, trace_channels
from ..tracing.meaning import inputs_of
from . import remarks
from .costs import Costs, Latencies, check_of, whole_steps
from .limits import Counts, Limits, Shares
from .pruning_plan import LayerPlan, PruningPlan
from .selection import LAST, Chooser, Selection
from .share import Aim, Reach, reach
from .thresholds import Ranking, as_factors, check_finite, magnitudes, thresholds

#: A layer that keeps a smaller share of its channels is pointed out.
ALMOST_NOTHING = 0.05
#: A share of the time is reached within this (a small one within a quarter), and a plan made again
#: so many times for it.
AS_ASKED, CORRECTIONS = 0.03, 2
#: Where γ have parted, few lie so closely above a valley's threshold.
GAP = 0.05

Notes = dict[str, list[str]]  # γ name -> what to know


def plan(
    model: nn.Module,
    example_inputs: Any,
    scales: ScalingFactors,
    method: str | None = None,
    round_to: Counts = 1,
    min_channels: Counts = 1,
    *,
    value: float | None = None,
    max_share: Shares | None = None,
    cut: float | None = None,
    of: str = "macs",
    latency: Latencies | None = None,
    fold: str = "exact",
    scores: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Choose the channels that stay (Sec. 3.3). The model is left as found.

    What should not pass in silence is warned of and in the plan's table (`PruningPlan.remarks`):
    that γ have not parted and (almost) nothing goes, that a share to cut takes channels that do
    something, that equal γ were told apart by their order.

    Limits only ever add channels back, the strongest first; the plan's notes say how many. Each is
    one number for all layers, or a mapping of regular expressions on γ's names to numbers, of which
    the first that matches a name decides: ``max_share={r"^layer1": 0.5, "": 0.9}``.

    Args:
        model: the trained network that `scales` was traced from.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; MACs are
            counted on these.
        scales: the scaling factors that may lose channels; their residual mode is used.
        method: "valley" (the paper's, and the default), "fixed" or "percentile", as in
            `thresholds`. Layers whose γ have no gap at the valley, as before they settle, are
            noted.
        round_to: widths, constant channels included, become multiples of this. A layer that is
            narrower or no multiple itself can end up whole, and a note says so.
        min_channels: no layer that stays is narrower; above 1, no layer disappears.
        value: the threshold for "fixed", the share of all channels to remove for "percentile".
        max_share: no layer loses a larger share of its channels than this, in [0, 1]; under 1, no
            layer disappears.
        cut: the share to cut, in [0, 1), in place of a threshold: as many of the weakest channels
            go as it takes, after all limits, so that at least this share is cut and one channel
            less would not be enough. With method="percentile", the default here, all channels of
            the network are in one order of |γ|; with "valley", those under their layer's valley
            come first. Equal γ are told apart: layers give the same share of them.
        of: what `cut` is a share of: "macs", "params", or "latency", the time of one forward pass.
        latency: the network's `LatencyTable`. Widths become multiples of its step, unless
            `round_to` says otherwise: less than that saves no time. Predicted times before and
            after are part of the plan (`PruningPlan.latency`); on the machine that the table was
            measured on, measured ones too: both networks are then timed in turns, and the plan is
            made again, twice at most, until the measured share is the one asked for within 3
            points (a quarter of it, for a small one).
        fold: what becomes of the removed channels' constants ("exact", "bias", "none"); sizes are
            predicted for this one.
        scores: name -> float [C] >= 0 for every layer of `scales`: what is compared with the
            threshold instead of |γ|, for other criteria than γ. What is removed is still what
            γ = 0 would remove.

    Raises:
        ArgumentError: an argument is out of range, or `scores` do not fit `scales`.
        PlanError: `scales` does not belong to `model`, or `cut` is out of reach; see `reachable`.
        ThresholdError: no threshold can be chosen for some layer's γ.
        ScalingFactorError: there are no scaling factors.
        TracingError: the model does not run on the example inputs.
    """
    check_scales("pf.plan", scales)
    check_of(of, latency)
    if latency is not None:
        latency.check_inputs(example_inputs)
        round_to = whole_steps(round_to, latency)
    limits = Limits.of(_sizes(scales), round_to, min_channels, max_share)
    aim = None if cut is None else Aim.given(cut, of, method, value, latency)
    method = method or ("valley" if aim is None else "percentile")
    check_fold(fold)
    chooser = _chooser(model, example_inputs, scales, fold, limits, latency)
    planner = _Planner(chooser, scales, scores, method, latency)
    if aim is None:
        written = planner.by_thresholds(value)
    elif of == "latency":
        written = planner.by_measured_share(aim)
    else:
        written = planner.by_share(aim)
    told = [*written.remarks]
    if written.inexact and fold == "exact":
        told.append(remarks.on_leftovers(written))  # in the plan's text, reader by reader
    for remark in told:
        warnings.warn(f"pf.plan: {remark}", stacklevel=2)
    return written


class _Planner:
    """Writes plans of one network.

    Args:
        chooser: of its channels.
        scales, scores, method, latency: as in `plan`.
    """

    def __init__(
        self,
        chooser: Chooser,
        scales: ScalingFactors,
        scores: Mapping[str, Tensor] | None,
        method: str,
        latency: Latencies | None,
    ) -> None:
        self._chooser, self._scales, self._method = chooser, scales, method
        self._costs = Costs(chooser.model, chooser.channels, latency)
        self._latency, self._by_gamma = latency, scores is None
        self._compared = magnitudes(scales, scores)
        self._factors = scales if scores is None else as_factors(self._compared)

    def by_thresholds(self, value: float | None) -> PruningPlan:
        """What is not over its layer's threshold goes."""
        bounds = thresholds(self._factors, self._method, value)
        choice, folded = self._chooser.choose(self._compared, bounds)
        notes = _limit_notes(choice)
        if self._method == "valley":
            _note_crowds(notes, self._compared, bounds, gaps=self._by_gamma)
        written = self._write(choice, folded, bounds, notes, {})
        if self._latency is not None:
            written.latency = self._latency.measured(self._chooser.model, written)
        if self._by_gamma and self._method == "percentile":
            written.remarks = remarks.on_share(written, self._scales)
        elif self._by_gamma:
            ended = (self._method, value) != ("fixed", 0.0)  # what is at 0 already, for `shrink`
            written.remarks = remarks.on_thresholds(written, self._scales, ended)
        return written

    def by_share(self, aim: Aim) -> PruningPlan:
        """As few of the weakest channels go as cut a share.

        Raises:
            PlanError: it is out of reach.
        """
        check_finite(self._factors)
        valleys = thresholds(self._factors) if self._method == "valley" else None
        ranking = Ranking(self._compared, valleys)
        trial = aim.hit(self._chooser, ranking)
        bounds, notes = ranking.thresholds(trial.count), _limit_notes(trial.choice)
        _note_ranking(notes, ranking, trial.count)
        asked = {"cut": aim.cut, "of": aim.of}
        written = self._write(trial.choice, trial.folded, bounds, notes, asked)
        if self._by_gamma:
            written.remarks = remarks.on_share(written, self._scales, ranking, trial.count)
        return written

    def by_measured_share(self, aim: Aim) -> PruningPlan:
        """The same for a share of the time; where that can be measured, what was measured decides,
        and the plan closest to the share is taken.

        Raises:
            PlanError: as for `by_share`.
        """
        assert self._latency is not None
        found: list[tuple[float, PruningPlan]] = []  # how far off, and what
        tolerance = min(AS_ASKED, aim.cut / 4)
        asked, latest = aim.cut, self.by_share(aim)
        while True:
            latest.latency = self._latency.measured(self._chooser.model, latest)
            cut = latest.latency.cut_measured
            if cut is None:
                return latest
            found.append((abs(cut - aim.cut), latest))
            if abs(cut - aim.cut) <= tolerance or len(found) > CORRECTIONS:
                break
            asked = min(max(asked + aim.cut - cut, 0.0), 1.0 - 1e-6)
            try:
                latest = self.by_share(replace(aim, cut=asked))
            except PlanError:  # more cannot go
                break
        missed, best = min(found, key=lambda pair: pair[0])
        best.asked["cut"] = aim.cut
        if missed > tolerance:
            best.remarks.append(remarks.on_latency(best, len(found)))
        return best

    def _write(
        self,
        choice: Selection,
        folded: Fold,
        bounds: Mapping[str, float | None],
        notes: Notes,
        asked: dict[str, Any],
    ) -> PruningPlan:
        chooser = self._chooser
        _note_widths(notes, choice, folded, chooser.limits)
        asked = {**chooser.limits.given, **asked}
        written = _write_plan(
            chooser, choice, folded, bounds, notes, self._costs, method=self._method, asked=asked
        )
        if self._by_gamma:
            written._gammas = {n: gamma.detach().clone() for n, gamma in self._scales.items()}
        written._inputs = chooser.inputs
        written._traced = Traced(chooser.model, chooser.channels)
        alive = choice.alive()
        written._folded = Folded(chooser.model, chooser.channels, alive, folded, chooser.fold)
        return written


def reachable(
    model: nn.Module,
    example_inputs: Any,
    scales: ScalingFactors,
    round_to: Counts = 1,
    min_channels: Counts = 1,
    *,
    max_share: Shares | None = None,
    latency: Latencies | None = None,
    fold: str = "exact",
    scores: Mapping[str, Tensor] | None = None,
) -> Reach:
    """The smallest and the largest share that `plan(cut=...)` can cut under these limits, and which
    of them bind. The model is left as found.

    Args:
        model, example_inputs, scales, round_to, min_channels, max_share, fold, scores: as in
            `plan`.
        latency: the network's `LatencyTable`, for the shares of its time, too.

    Raises:
        ArgumentError, PlanError, ScalingFactorError, TracingError: as in `plan`.
    """
    check_scales("pf.reachable", scales)
    if latency is not None:
        latency.check_inputs(example_inputs)
        round_to = whole_steps(round_to, latency)
    limits = Limits.of(_sizes(scales), round_to, min_channels, max_share)
    check_fold(fold)
    chooser = _chooser(model, example_inputs, scales, fold, limits, latency)
    if scores is None:
        check_finite(scales)
    return reach(chooser, Ranking(magnitudes(scales, scores)), latency)


def mac_weights(
    model: nn.Module,
    example_inputs: Any,
    scales: ScalingFactors,
    low: float = 0.5,
    high: float = 1.5,
) -> dict[str, float]:
    """Layer weights by what a channel costs, for `Polarization(weights=...)`: the multiply-
    accumulates that go when one of the layer's channels goes, rescaled to [low, high] (the authors'
    program). The model is left as found.

    Args:
        model, example_inputs, scales: as in `plan`.
        low, high: weights of the layers with the cheapest and the dearest channels; `high` for all
            where there is no difference.

    Returns:
        Name of γ -> weight.

    Raises:
        ArgumentError: not 0 <= low <= high.
        PlanError, TracingError: as in `plan`.
    """
    if not 0.0 <= low <= high < float("inf"):
        raise ArgumentError(f"low={low!r}, high={high!r}: give 0 <= low <= high")
    model = unwrap(model)
    channels = trace_channels(model, example_inputs, scales.residual)
    check_belongs(model, channels, scales)
    costs, everything = Costs(model, channels), ~channels.graph.mask()
    saved = {}
    for name in scales:
        one = everything.clone()
        one[channels.layers[name][0]] = False
        saved[name] = costs.macs(everything) - costs.macs(one)
    least, most = min(saved.values()), max(saved.values())
    span = (high - low) / max(most - least, 1)
    return {name: high - span * (most - macs) for name, macs in saved.items()}


def check_scales(call: str, scales: object) -> None:
    """Raise ArgumentError for what are no scaling factors, as where arguments change places."""
    if not isinstance(scales, ScalingFactors):
        raise ArgumentError(
            f"{call}(model, example_inputs, scales) was given a {type(scales).__name__} as scales: "
            "pass what pf.scaling_factors or pf.add_gates returned, after the example inputs"
        )


def _sizes(scales: ScalingFactors) -> dict[str, int]:
    return {name: gamma.numel() for name, gamma in scales.items()}


def _chooser(
    model: nn.Module,
    example_inputs: Any,
    scales: ScalingFactors,
    fold: str,
    limits: Limits,
    latency: Latencies | None,
) -> Chooser:
    model = unwrap(model)
    timed = latency is not None
    channels = trace_channels(model, example_inputs, scales.residual, with_operations=timed)
    check_belongs(model, channels, scales)
    inputs = inputs_of(model, example_inputs)
    return Chooser(model, channels, inputs, scales, fold, limits)


def check_belongs(model: nn.Module, channels: Channels, scales: ScalingFactors) -> None:
    """Raise PlanError unless every factor takes part in this model."""
    params = dict(model.named_parameters())
    for name, gamma in scales.items():
        if params.get(name) is not gamma:
            raise PlanError(
                f"scales[{name!r}] is not a parameter of this model: call scaling_factors(model, "
                "…) on the model to plan, or take scales.rebind(model)"
                f"{misplaced(scales, model) or lost_gates([name])}"
            )
        if name not in channels.layers:
            raise PlanError(
                f"{name} takes no part in this model as it runs now: "
                f"{channels.pinned.get(name, 'it did not run')}"
            )


def _write_plan(
    chooser: Chooser,
    choice: Selection,
    folded: Fold,
    bounds: Mapping[str, float | None],
    notes: Notes,
    costs: Costs,
    *,
    method: str,
    asked: dict[str, Any],
) -> PruningPlan:
    """The plan of a selection and its constants.

    Args:
        bounds: γ name -> threshold.
        costs: of the network.
        method, asked: how the plan was made, as in `PruningPlan`.
    """
    model, channels = chooser.model, chooser.channels
    everything = ~channels.graph.mask()
    stays = choice.staying(folded.constant)
    constant = choice.positions(folded.constant)
    layers = {
        name: LayerPlan(labels.numel(), bounds[name], "; ".join(notes[name]), constant[name])
        for name, labels in choice.layers.items()
    }
    return PruningPlan(
        kept=choice.kept(),
        layers=layers,
        pinned=dict(channels.pinned),
        pinned_macs=dict(channels.pinned_macs),
        residual=channels.residual,
        method=method,
        fold=chooser.fold,
        inputs=chooser.inputs.specs[0],
        macs_before=costs.macs(everything),
        macs=costs.macs(stays),
        params_before=costs.params(everything),
        params=costs.params(stays, new_biases(model, channels, folded).values()),
        latency=costs.times(everything, stays),
        inexact=folded.notes(),
        asked=asked,
    )


def _limit_notes(choice: Selection) -> Notes:
    """What came back for the limits, and what nothing reads."""
    found: Notes = {}
    for name, first, now in zip(choice.layers, choice.first, choice.counts(), strict=True):
        mine = found[name] = []
        if name in choice.unread:
            mine.append("nothing reads it any more")
            if not now:
                continue
        reasons = dict(choice.added[name])
        if reasons.pop(LAST, 0):
            mine.append(LAST)
        coupled = now - first - sum(choice.added[name].values())
        if coupled > 0:
            reasons["coupled layers"] = coupled
        if reasons:
            several = len(reasons) > 1
            each = [f"{number} {why}" if several else why for why, number in reasons.items()]
            mine.append(f"{sum(reasons.values())} added back ({', '.join(each)})")
    return found


def _note_crowds(
    notes: Notes,
    compared: Mapping[str, Tensor],
    bounds: Mapping[str, float | None],
    gaps: bool,
) -> None:
    """Point out layers without a valley, and (`gaps`) those whose threshold runs through γ that
    have not parted: of these, most of what stays is hardly larger than what goes, and what goes may
    be missed. Single γ on their way to one side are harmless.
    """
    for name, bound in bounds.items():
        if bound is None:
            notes[name].insert(0, "no valley: nothing removed")
            continue
        above = compared[name][compared[name] > bound]
        near = int((above <= bound + GAP).sum())
        crowded = near and 2 * near >= above.numel() and above.numel() < compared[name].numel()
        if gaps and crowded:
            notes[name].append(
                f"no gap: {near} of {above.numel()} above the threshold lie within {GAP:g} of it"
            )


def _note_ranking(notes: Notes, ranking: Ranking, count: int) -> None:
    """Say where the share asked for goes on above a valley, or between equal γ."""
    above, ties = ranking.above_valleys(count), ranking.ties(count)
    for name, mine in notes.items():
        if above[name]:
            mine.insert(0, f"{above[name]} above its valley go, to reach the share to cut")
        if ties[name]:
            mine.insert(0, f"{ties[name]} equal to the threshold stay, the first ones")


def _note_widths(notes: Notes, choice: Selection, folded: Fold, limits: Limits) -> None:
    """Say where a width cannot be a multiple of `round_to`, which layers keep almost nothing, and
    which keep nothing.
    """
    constant = choice.positions(folded.constant)
    for (name, labels), kept in zip(choice.layers.items(), choice.counts(), strict=True):
        full, multiple = labels.numel(), limits.round_to[name]
        width = kept + len(constant[name])
        if width % multiple:
            why = f"fewer than {multiple}" if full < multiple else f"no multiple of {multiple}"
            notes[name].append(f"whole, since {full} channels are {why}")
        if 0 < kept < ALMOST_NOTHING * full:
            notes[name].append("almost everything goes: is λ too strong here?")
        if not kept:
            notes[name].append("branch is constant" if constant[name] else "branch disappears")
