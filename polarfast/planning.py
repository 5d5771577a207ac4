"""`plan`: from thresholds to the channels that stay, and what that saves."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Channels
from .edits import new_biases
from .errors import ArgumentError, PlanError
from .fields import Fold
from .folding import fold_constants
from .inputs import describe, unwrap
from .layout import Layout
from .modules import can_be_silent
from .plans import LayerPlan, PruningPlan
from .scaling import ScalingFactors, analyze
from .selection import Selection
from .sharded import whole
from .thresholding import thresholds

FOLDS = ("exact", "bias", "none")
#: A layer that keeps a smaller share of its channels is pointed out.
ALMOST_NOTHING = 0.05
#: Where γ have parted, few lie so closely above a valley's threshold.
GAP = 0.05


def plan(
    model: nn.Module,
    example_inputs: Any,
    scales: ScalingFactors,
    method: str = "valley",
    round_to: int = 1,
    min_channels: int = 1,
    *,
    value: float | None = None,
    fold: str = "exact",
    scores: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Choose the channels that stay (Sec. 3.3). The model is left as found.

    Args:
        model: the trained network that `scales` was traced from.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; MACs are
            counted on these.
        scales: the scaling factors that may lose channels; their residual mode is used.
        method: "valley" (the paper's), "fixed" or "percentile", as in `thresholds`. Layers whose
            γ have no gap at the valley, as before they settle, are noted.
        round_to: widths become multiples of this; channels are added back in order of γ, never
            removed for it.
        min_channels: no layer that stays is narrower.
        value: the threshold for "fixed", the share of all channels to remove for "percentile".
        fold: what becomes of the removed channels' constants ("exact", "bias", "none"); sizes are
            predicted for this one.
        scores: name -> float [C] >= 0 for every layer of `scales`: what is compared with the
            threshold instead of |γ|, for other criteria than γ. What is removed is still what
            γ = 0 would remove.

    Raises:
        ArgumentError: an argument is out of range, or `scores` do not fit `scales`.
        PlanError: `scales` does not belong to `model`.
        ThresholdError: no threshold can be chosen for some layer's γ.
        TracingError: the model does not run on the example inputs.
    """
    check_limits(round_to, min_channels, fold)
    model = unwrap(model)
    channels = analyze(model, example_inputs, scales.residual)
    check_belongs(model, channels, scales)
    compared = magnitudes(scales, scores)
    limits = thresholds(scales if scores is None else as_factors(compared), method, value)
    spec = describe(example_inputs)

    def constants(choice: Selection) -> Fold:
        return fold_constants(model, channels, choice.kept(), choice.alive(), spec, fold)

    vanishing = can_vanish(model, channels)
    choice, folded, unread = select(
        channels, compared, limits, vanishing, constants, round_to, min_channels
    )
    if method == "valley" and scores is None:
        _note_crowds(choice, compared, limits)
    return _write(
        model, channels, choice, folded, limits, unread, spec=spec, method=method, fold=fold
    )


def select(
    channels: Channels,
    compared: Mapping[str, Tensor],
    limits: Mapping[str, float | None],
    vanishing: Callable[[Tensor], bool],
    constants: Callable[[Selection], Fold],
    round_to: int,
    min_channels: int,
) -> tuple[Selection, Fold, list[str]]:
    """Choose the channels that stay, under all limits.

    Args:
        compared: name -> float [C] on the CPU, what is compared with the thresholds.
        limits: name -> threshold.
        vanishing: as returned by `can_vanish`.
        constants: works out the constant channels that a selection calls for.

    Returns:
        The selection, its constants, and the layers that nothing reads any more.
    """
    choice = Selection(channels, compared)
    choice.cut(compared, limits)
    choice.keep_paths(vanishing if min_channels == 1 else lambda mask: False)
    choice.limit(min_channels, 1, {})
    unread = choice.drop_unread(vanishing)
    while True:  # widths count constant channels, and adding channels back changes which are needed
        folded = constants(choice)
        before = choice.stays.clone()
        widths = {name: len(found) for name, found in choice.positions(folded.constant).items()}
        choice.limit(min_channels, round_to, widths)
        if torch.equal(before, choice.stays):
            return choice, folded, unread


def magnitudes(
    scales: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What is compared with a threshold: |γ|, or the given scores. Float32 on the CPU. Sharded γ
    are gathered in one collective.

    Raises:
        ArgumentError: `scores` are not one finite number >= 0 for each γ.
    """
    if scores is None:
        gammas = whole({name: gamma.detach() for name, gamma in scales.items()})
        return {name: gamma.abs().float().cpu() for name, gamma in gammas.items()}
    _check_names(scales, scores)
    found = {}
    for name, gamma in scales.items():
        score = scores[name]
        if not isinstance(score, Tensor) or score.shape != gamma.shape:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ArgumentError(f"scores[{name!r}]: give a tensor {list(gamma.shape)}, not {got}")
        score = score.detach().float().cpu().contiguous()
        if not bool((score.isfinite() & (score >= 0)).all()):
            raise ArgumentError(
                f"scores[{name!r}] holds negative, infinite or NaN values: a score is a finite "
                "number >= 0, the higher the more worth keeping"
            )
        found[name] = score
    return found


def _check_names(scales: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
    for name in scores:
        if name not in scales:
            raise ArgumentError(f"scores[{name!r}]: no such layer among the scaling factors")
    for name in scales:
        if name not in scores:
            raise ArgumentError(f"scores lack {name!r}: give one for every layer of scales")


def _note_crowds(
    choice: Selection, compared: Mapping[str, Tensor], limits: Mapping[str, float | None]
) -> None:
    """Point out layers whose threshold runs through γ that have not parted: of these, most of what
    stays is hardly larger than what goes, and what goes may be missed. Single γ on their way to one
    side are harmless.
    """
    for name, limit in limits.items():
        if limit is None:
            continue
        above = compared[name][compared[name] > limit]
        near = int((above <= limit + GAP).sum())
        if near and 2 * near >= above.numel() and above.numel() < compared[name].numel():
            choice.notes[name].append(
                f"no gap: {near} of {above.numel()} above the threshold lie within {GAP:g} of it"
            )


def check_limits(round_to: int, min_channels: int, fold: str) -> None:
    """Raise ArgumentError unless these are settings of a plan."""
    for name, number in (("round_to", round_to), ("min_channels", min_channels)):
        if not isinstance(number, int) or number < 1:
            raise ArgumentError(f"{name}={number!r}: give a whole number of channels, at least 1")
    if fold not in FOLDS:
        raise ArgumentError(f"fold={fold!r}: choose one of {', '.join(map(repr, FOLDS))}")


def check_belongs(model: nn.Module, channels: Channels, scales: ScalingFactors) -> None:
    """Raise PlanError unless every factor takes part in this model."""
    params = dict(model.named_parameters())
    for name, gamma in scales.items():
        if params.get(name) is not gamma:
            raise PlanError(
                f"scales[{name!r}] is not a parameter of this model: call scaling_factors(model, "
                "…) on the model to plan, or take scales.rebind(model)"
            )
        if name not in channels.layers:
            raise PlanError(
                f"{name} takes no part in this model as it runs now: "
                f"{channels.pinned.get(name, 'it did not run')}"
            )


def can_vanish(model: nn.Module, channels: Channels) -> Callable[[Tensor], bool]:
    """Whether some classes (bool [graph.count] by label) may all go: everything around them must
    work on no channels at all.
    """
    graph = channels.graph
    pooled = graph.mask()
    for ids in graph.pooled:
        pooled[channels.label[ids]] = True

    def check(mask: Tensor) -> bool:
        if bool((pooled & mask).any()):
            return False
        touched = {
            tensor
            for (tensor, _), ids in graph.axes.items()
            if bool(mask[channels.label[ids]].any())
        }
        return all(
            can_be_silent(model.get_submodule(tensor.rpartition(".")[0])) for tensor in touched
        )

    return check


def _write(
    model: nn.Module,
    channels: Channels,
    choice: Selection,
    folded: Fold,
    limits: dict[str, float | None],
    unread: list[str],
    *,
    spec: dict[str, Any],
    method: str,
    fold: str,
) -> PruningPlan:
    alive = choice.alive()
    alive |= channels.in_classes(folded.constant)
    layout = Layout(channels, alive)
    whole = Layout(channels, torch.ones_like(alive))
    kept = choice.kept()
    constant = choice.positions(folded.constant)
    layers = {}
    for name, left in kept.items():
        notes = list(choice.notes[name])
        if name in unread:
            notes.append("nothing reads it any more")
        if 0 < left.numel() < ALMOST_NOTHING * choice.layers[name].numel():
            notes.append("almost everything goes: is λ too strong here?")
        if not left.numel():
            notes.append("branch is constant" if constant[name] else "branch disappears")
        layers[name] = LayerPlan(
            choice.layers[name].numel(), limits[name], "; ".join(notes), constant[name]
        )
    return PruningPlan(
        kept=kept,
        layers=layers,
        pinned=dict(channels.pinned),
        residual=channels.residual,
        method=method,
        fold=fold,
        inputs=spec,
        macs_before=whole.macs(),
        macs=layout.macs(),
        params_before=whole.params(model, {}),
        params=layout.params(model, new_biases(model, channels, folded, alive)),
        inexact=folded.notes(),
    )


def as_factors(scores: Mapping[str, Tensor]) -> ScalingFactors:
    """Scores in the place of scaling factors, so that thresholds can be chosen for them."""
    params = {name: nn.Parameter(score, requires_grad=False) for name, score in scores.items()}
    return ScalingFactors(params)
