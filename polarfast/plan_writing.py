"""From a choice of channels to the plan that records it."""

from collections.abc import Mapping
from typing import Any

import torch

from .choosing import Chooser
from .edits import new_biases
from .fields import Fold
from .layout import Layout
from .plan_notes import Notes
from .plans import LayerPlan, PruningPlan
from .selection import Selection


def write_plan(
    chooser: Chooser,
    choice: Selection,
    folded: Fold,
    bounds: Mapping[str, float | None],
    notes: Notes,
    *,
    method: str,
    asked: dict[str, Any],
) -> PruningPlan:
    """The plan of a selection and its constants.

    Args:
        bounds: γ name -> threshold.
        method, asked: how the plan was made, as in `PruningPlan`.
    """
    model, channels = chooser.model, chooser.channels
    alive = choice.alive()
    alive |= channels.in_classes(folded.constant)
    layout, whole = Layout(channels, alive), Layout(channels, torch.ones_like(alive))
    constant = choice.positions(folded.constant)
    layers = {
        name: LayerPlan(labels.numel(), bounds[name], "; ".join(notes[name]), constant[name])
        for name, labels in choice.layers.items()
    }
    return PruningPlan(
        kept=choice.kept(),
        layers=layers,
        pinned=dict(channels.pinned),
        residual=channels.residual,
        method=method,
        fold=chooser.fold,
        inputs=chooser.spec,
        macs_before=whole.macs(),
        macs=layout.macs(),
        params_before=whole.params(model, {}),
        params=layout.params(model, new_biases(model, channels, folded, alive)),
        inexact=folded.notes(),
        asked=asked,
    )
