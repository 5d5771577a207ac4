"""What a plan is not silent about: that it removes nothing, or channels that do something."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers import is_gate
from ..scaling.factors import ScalingFactors
from ..stepping.binding import Binding
from .pruning_plan import PruningPlan
from .thresholds import Ranking

#: A plan that cuts a smaller share of the MACs has not found much.
LITTLE = 0.01
#: Removed channels that hold a larger share of all |γ| were doing something.
MASS = 0.02
#: Where γ have parted, those that go are under this; a larger one was doing something.
AT_ZERO = 0.01


def on_thresholds(plan: PruningPlan, scales: ScalingFactors, ended: bool = True) -> list[str]:
    """Of a plan that γ themselves decided.

    Args:
        ended: whether the training with the penalty is over, as far as the plan is concerned.
    """
    last = Binding.of(scales).last
    found = [text] if ended and last is not None and (text := last.remark()) else []
    sizes = {name: gamma.detach().abs().float().cpu() for name, gamma in scales.items()}
    shrunk = last is not None and last.shrunk  # what was at 0 has gone already
    if plan.flops_reduction < LITTLE and not shrunk:
        channels = sum(layer.channels for layer in plan.layers.values())
        gone = channels - sum(kept.numel() for kept in plan.kept.values())
        smallest = {name: float(each.min()) for name, each in sizes.items()}
        name = min(smallest, key=smallest.__getitem__)
        found.append(
            f"{gone} of {channels} channels go, {plan.flops_reduction:.1%} of the MACs: hardly any "
            f"γ has reached 0. The smallest is {smallest[name]:.2g}, in {name}{_drift(scales)}. "
            "Train with pf.FlopsTarget(model, x, scales, cut=0.5, steps=epochs * len(loader)), or "
            "with a larger λ; pf.plan(..., cut=0.5) takes the smallest as they are"
        )
    _, largest, name = removed(plan, sizes)
    if largest > AT_ZERO:
        found.append(
            f"γ that go are up to {largest:.2g} (in {name}) and count as 0, which changes what the "
            "network computes by as much: they were still on their way, or shaken by the last "
            "steps; some more at a small learning rate let them settle at 0"
        )
    return found


def _drift(scales: ScalingFactors) -> str:
    """How far the penalty has pushed, where it has and that is known."""
    drift = Binding.of(scales).drift
    return f"; all steps so far could move a γ by {drift:.2g}" if drift else ""


def on_share(
    plan: PruningPlan, scales: ScalingFactors, ranking: Ranking | None = None, count: int = 0
) -> list[str]:
    """Of a plan that a share decided.

    Args:
        ranking, count: how γ were ranked, and how many went; None: by a threshold, so that no two
            equal ones were told apart.
    """
    found = []
    sizes = {name: gamma.detach().abs().float().cpu() for name, gamma in scales.items()}
    gone, largest, name = removed(plan, sizes)
    if gone > MASS:
        found.append(
            f"the channels that go hold {gone:.0%} of the sum of |γ| (up to {largest:.2g}, in "
            f"{name}), so they do something: expect a drop in accuracy until it is fine-tuned. "
            "pf.FlopsTarget or another penalty in training brings those that go to 0 first"
        )
    if ranking is None:
        return found
    tied = {layer: number for layer, number in ranking.ties(count).items() if number}
    bounds = ranking.thresholds(count)
    at = {layer: bounds[layer] or 0.0 for layer in tied}
    if tied and max(at.values()) > AT_ZERO:
        found.append(
            f"{sum(tied.values())} channels stay though their γ equal that of some that go "
            f"({at[next(iter(tied))]:.2g}, in {next(iter(tied))}): their order in the layer decided"
        )
    return found


def on_latency(plan: PruningPlan, tries: int) -> str:
    """Of a plan for a share of the time that was measured, and not reached."""
    assert plan.latency is not None and plan.latency.cut_measured is not None
    asked, cut = plan.asked["cut"], plan.latency.cut_measured
    return (
        f"{asked:.0%} of the time were to go, {cut:.0%} go as measured here, the closest of "
        f"{tries} plan{'s' * (tries > 1)}: other work on this machine, or steps too wide "
        "(LatencyTable.measure(step=...)), or more cannot go"
    )


def removed(plan: PruningPlan, sizes: Mapping[str, Tensor]) -> tuple[float, float, str]:
    """The share of all |γ| that removed channels hold; the largest of them, and its layer."""
    total = sum(float(each.sum()) for each in sizes.values())
    gone, largest, where = 0.0, 0.0, ""
    for name, each in sizes.items():
        goes = torch.ones(each.numel(), dtype=torch.bool, device="cpu")
        goes[plan.kept[name]] = False
        if not bool(goes.any()):
            continue
        gone += float(each[goes].sum())
        if float(each[goes].max()) >= largest:
            largest, where = float(each[goes].max()), name
    return gone / max(total, 1e-30), largest, where


def on_leftovers(plan: PruningPlan) -> str:
    """What removed channels leave behind is not taken up exactly somewhere."""
    reader, why = next(iter(plan.inexact.items()))
    count = len(plan.inexact)
    gates = "" if any(map(is_gate, plan.layers)) else ", nor do gates (pf.add_gates)"
    return (
        f"what removed channels leave behind is not exact in {count} layer{'s' * (count > 1)} "
        f"({reader}: {why}), and the slim model differs there until it is fine-tuned; "
        f"plan.inexact has them all. pf.FlopsTarget leaves nothing behind{gates}"
    )
