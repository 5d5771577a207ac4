"""`plan`: from thresholds to the channels that stay, and what that saves."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .aiming import Aim, Reach, reach
from .channels import Channels
from .choosing import Chooser
from .errors import PlanError
from .gates import lost_gates
from .inputs import describe, unwrap
from .limits import Counts, Limits, Shares, check_fold
from .plan_notes import limit_notes, note_crowds, note_ranking, note_widths
from .plan_writing import write_plan
from .plans import PruningPlan
from .recalling import Made
from .retracing import Traced, traced
from .scaling import ScalingFactors
from .scores import Ranking, as_factors, magnitudes
from .thresholding import check_finite, thresholds


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
    fold: str = "exact",
    scores: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Choose the channels that stay (Sec. 3.3). The model is left as found.

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
        of: what `cut` is a share of: "macs" or "params".
        fold: what becomes of the removed channels' constants ("exact", "bias", "none"); sizes are
            predicted for this one.
        scores: name -> float [C] >= 0 for every layer of `scales`: what is compared with the
            threshold instead of |γ|, for other criteria than γ. What is removed is still what
            γ = 0 would remove.

    Raises:
        ArgumentError: an argument is out of range, or `scores` do not fit `scales`.
        PlanError: `scales` does not belong to `model`, or `cut` is out of reach; see `reachable`.
        ThresholdError: no threshold can be chosen for some layer's γ.
        TracingError: the model does not run on the example inputs.
    """
    limits = Limits.of(_sizes(scales), round_to, min_channels, max_share)
    aim = None if cut is None else Aim.given(cut, of, method, value)
    method = method or ("valley" if aim is None else "percentile")
    check_fold(fold)
    chooser, found = _chooser(model, example_inputs, scales, fold, limits)
    compared = magnitudes(scales, scores)
    factors = scales if scores is None else as_factors(compared)
    if aim is None:
        bounds = thresholds(factors, method, value)
        choice, folded = chooser.choose(compared, bounds)
        notes = limit_notes(choice)
        if method == "valley":
            note_crowds(notes, compared, bounds, gaps=scores is None)
    else:
        check_finite(factors)
        ranking = Ranking(compared, thresholds(factors) if method == "valley" else None)
        trial = aim.hit(chooser, ranking)
        choice, folded = trial.choice, trial.folded
        bounds, notes = ranking.thresholds(trial.count), limit_notes(choice)
        note_ranking(notes, ranking, trial.count)
    note_widths(notes, choice, folded, limits)
    asked = dict(limits.given) | ({} if aim is None else {"cut": aim.cut, "of": aim.of})
    written = write_plan(chooser, choice, folded, bounds, notes, method=method, asked=asked)
    written._made = Made.of(chooser.model, found, choice.alive(), folded, fold)
    return written


def reachable(
    model: nn.Module,
    example_inputs: Any,
    scales: ScalingFactors,
    round_to: Counts = 1,
    min_channels: Counts = 1,
    *,
    max_share: Shares | None = None,
    fold: str = "exact",
    scores: Mapping[str, Tensor] | None = None,
) -> Reach:
    """The smallest and the largest share that `plan(cut=...)` can cut under these limits, and which
    of them bind. The model is left as found.

    Args:
        model, example_inputs, scales, round_to, min_channels, max_share, fold, scores: as in
            `plan`.

    Raises:
        ArgumentError, PlanError, TracingError: as in `plan`.
    """
    limits = Limits.of(_sizes(scales), round_to, min_channels, max_share)
    check_fold(fold)
    chooser, _ = _chooser(model, example_inputs, scales, fold, limits)
    if scores is None:
        check_finite(scales)
    return reach(chooser, Ranking(magnitudes(scales, scores)))


def _sizes(scales: ScalingFactors) -> dict[str, int]:
    return {name: gamma.numel() for name, gamma in scales.items()}


def _chooser(
    model: nn.Module, example_inputs: Any, scales: ScalingFactors, fold: str, limits: Limits
) -> tuple[Chooser, Traced]:
    model, spec = unwrap(model), describe(example_inputs)
    found = traced(model, example_inputs, scales.residual, scales._traced)
    check_belongs(model, found.channels, scales)
    return Chooser(model, found.channels, spec, scales, fold, limits), found


def check_belongs(model: nn.Module, channels: Channels, scales: ScalingFactors) -> None:
    """Raise PlanError unless every factor takes part in this model."""
    params = dict(model.named_parameters())
    for name, gamma in scales.items():
        if params.get(name) is not gamma:
            raise PlanError(
                f"scales[{name!r}] is not a parameter of this model: call scaling_factors(model, "
                f"…) on the model to plan, or take scales.rebind(model){lost_gates([name])}"
            )
        if name not in channels.layers:
            raise PlanError(
                f"{name} takes no part in this model as it runs now: "
                f"{channels.pinned.get(name, 'it did not run')}"
            )
