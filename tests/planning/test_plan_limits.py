"""Limits of a plan: what each layer may lose, widths that are multiples, and what the notes say."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    X,
    chain,
    conv_bn,
    prepared,
)
from support.planning import check_sizes, make, width
from torch import nn

import polarfast as pf

NETS = [chain, Residual, Bottlenecks, Branches, Grouped, SqueezeExcite]


class TwoBranches(nn.Module):
    """A branch of two convolutions beside a plain one, read with zero padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.ReLU())
        self.long = nn.Sequential(*conv_bn(16, 16), nn.ReLU(), *conv_bn(16, 16), nn.ReLU())
        self.short = nn.Sequential(*conv_bn(16, 16), nn.ReLU())
        self.join = nn.Sequential(*conv_bn(32, 16), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        return self.join(torch.cat([self.long(x), self.short(x)], 1)).mean((2, 3))


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    build=st.sampled_from(NETS),
    residual=st.sampled_from(["keep", "expand", "couple"]),
    value=st.floats(0.1, 0.99),
    round_to=st.sampled_from([2, 3, 4, 8, 16]),
    least=st.sampled_from([1, 1, 3]),
    share=st.sampled_from([1.0, 1.0, 0.7, 0.4]),
    fold=st.sampled_from(["exact", "exact", "bias", "none"]),
    seed=st.integers(0, 20),
)
def test_limits_hold_or_a_note_says_why(build, residual, value, round_to, least, share, fold, seed):
    model, scales = make(build, residual, seed)
    options = {"method": "fixed", "value": value, "fold": fold}
    free = pf.plan(model, X, scales, **options)
    limited = {**options, "min_channels": least, "max_share": share}
    unrounded = pf.plan(model, X, scales, **limited)
    plan = pf.plan(model, X, scales, round_to=round_to, **limited)
    for name, gamma in scales.items():
        full, note = gamma.numel(), plan.layers[name].note
        kept, before = set(plan.kept[name].tolist()), set(unrounded.kept[name].tolist())
        assert set(free.kept[name].tolist()) <= before <= kept
        assert width(plan, name) >= width(unrounded, name) or len(kept) == full
        if width(plan, name) % round_to:
            assert len(kept) == full and f"whole, since {full} channels are" in note
        vanished = not kept and least == 1 and share == 1
        assert vanished or "nothing reads it" in note or len(kept) >= min(least, full)
        assert "nothing reads it" in note or full - len(kept) <= share * full + 1e-9
        gamma = gamma.detach()
        came_back = kept - set((gamma.float() > value).nonzero()[:, 0].tolist())
        told = "added back" in note or "would lose everything" in note
        assert told == bool(came_back) or residual == "couple"  # others may keep them there
        lost = [float(gamma[i]) for i in set(range(full)) - kept]
        if residual != "couple" and build is not Grouped:  # the strongest come back first
            assert all(gamma[i] >= max(lost, default=0.0) for i in came_back)
    check_sizes(model, plan, X)


def test_a_layer_loses_no_larger_share_than_allowed():
    model, scales = make(chain)
    for share, least in ((0.0, [8, 12, 10]), (0.29, [6, 9, 8]), (0.5, [4, 6, 5]), (1.0, [1, 1, 1])):
        plan = pf.plan(model, X, scales, "fixed", value=2.0, max_share=share)
        assert [kept.numel() for kept in plan.kept.values()] == least[: len(scales)]
        for name, kept in plan.kept.items():
            order = scales[name].argsort(descending=True)
            assert kept.tolist() == sorted(order[: kept.numel()].tolist())


def test_limits_by_layer():
    model, scales = make(Residual, "expand")
    names = list(scales)
    plan = pf.plan(
        model,
        X,
        scales,
        "fixed",
        value=2.0,
        max_share={r"^first\.1": 0.5, r"^first": 0.25},
        min_channels={r"second": 7},
        round_to={r"second": 4},
    )
    kept = {name: plan.kept[name].numel() for name in names}
    assert kept["first.1.weight"] == 3 and kept["first.4.weight"] == 6
    assert kept["second.1.weight"] + len(plan.layers["second.1.weight"].constant) == 8
    assert plan.layers["first.1.weight"].note == "3 added back (max_share)"
    assert plan.layers["second.4.weight"].note == "8 added back (7 min_channels, 1 round_to)"
    assert plan.asked["max_share"] == {r"^first\.1": 0.5, r"^first": 0.25}
    assert f"asked for: round_to={plan.asked['round_to']}" in str(plan)


def test_layers_that_no_multiple_fits_are_noted():
    model, scales = make(chain)
    plan = pf.plan(model, X, scales, "fixed", value=2.0, round_to=16)
    notes = {plan.layers[name].channels: plan.layers[name].note for name in scales}
    assert "whole, since 8 channels are fewer than 16" in notes[8]
    plan = pf.plan(model, X, scales, "fixed", value=0.2, round_to=5)
    twelve = next(name for name in scales if plan.layers[name].channels == 12)
    gone = int((scales[twelve] <= 0.2).sum())
    assert gone == 1  # 11 would stay, and 10 of 12 are fewer
    assert "whole, since 12 channels are no multiple of 5" in plan.layers[twelve].note
    assert plan.kept[twelve].numel() == 12


def test_what_fed_an_emptied_branch_comes_back_with_it():
    model, scales = prepared(TwoBranches, share=0)
    with torch.no_grad():
        scales["long.4.weight"].zero_()
        model.long[4].bias.fill_(1.0)  # seen through the padding: a constant channel
    free = pf.plan(model, X, scales, "fixed", value=0.1)
    assert free.kept["long.4.weight"].numel() == free.kept["long.1.weight"].numel() == 0
    assert len(free.layers["long.4.weight"].constant) == 1
    plan = pf.plan(model, X, scales, "fixed", value=0.1, round_to=8)
    assert width(plan, "long.4.weight") == 8 and width(plan, "long.1.weight") == 16
    slim = check_sizes(model, plan, X)
    assert pf.verify(model, slim, plan, X).exact
    for limits in ({"min_channels": 3}, {"max_share": 0.75}):
        plan = pf.plan(model, X, scales, "fixed", value=0.1, **limits)
        assert plan.kept["long.4.weight"].numel() >= 3
        assert plan.kept["long.1.weight"].numel() == 16


def test_the_front_of_a_branch_that_disappears_is_exempt():
    model, scales = make(Residual, "expand")
    with torch.no_grad():
        scales["first.4.weight"].zero_()
    plan = pf.plan(
        model, X, scales, "fixed", value=0.01, max_share={r"first\.1": 0.5}, min_channels=1
    )
    assert plan.kept["first.1.weight"].numel() == 0
    assert "nothing reads it any more" in plan.layers["first.1.weight"].note


def test_predictions_follow_all_limits():
    for residual in ("expand", "couple"):
        model, scales = make(Residual, residual)
        limits = {"max_share": {"first": 0.5, "": 0.8}, "round_to": 2, "min_channels": {"4": 3}}
        predictor = pf.CutPredictor(model, X, scales, "fixed", value=0.6, **limits)
        plan = pf.plan(model, X, scales, "fixed", value=0.6, **limits)
        free = pf.plan(model, X, scales, "fixed", value=0.6)
        assert predictor.cut() == plan.flops_reduction < free.flops_reduction


def test_plans_carry_what_was_asked_for():
    model, scales = make(Residual, "expand")
    plan = pf.plan(model, X, scales, round_to=4, max_share={"first": 0.5}, cut=0.2, of="params")
    again = pf.PruningPlan.from_json(plan.to_json())
    assert again.asked == plan.asked == {
        "round_to": 4, "max_share": {"first": 0.5}, "cut": 0.2, "of": "params",
    }  # fmt: skip
    assert again.to_json() == plan.to_json() and str(again) == str(plan)
    assert pf.plan(model, X, scales).asked == {}
    old = json.loads(plan.to_json())
    del old["asked"]  # as plans were before
    assert pf.PruningPlan.from_json(json.dumps(old)).asked == {}
    old["asked"] = 3
    with pytest.raises(pf.PlanError, match="damaged"):
        pf.PruningPlan.from_json(json.dumps(old))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_share": 1.5}, "max_share=1.5: give the largest share"),
        ({"max_share": -0.1}, "max_share=-0.1"),
        ({"max_share": "half"}, "max_share='half'"),
        ({"max_share": {"first": 2}}, r"max_share\['first'\]=2"),
        ({"max_share": {"nowhere": 0.5}}, r"max_share\['nowhere'\] matches no layer"),
        ({"max_share": {"(": 0.5}}, "not a regular expression"),
        ({"round_to": {"first": 0}}, r"round_to\['first'\]=0"),
        ({"round_to": 2.0}, "round_to=2.0: give a whole number"),
        ({"min_channels": True}, "min_channels=True"),
    ],
)
def test_limits_are_checked(limits, message):
    model, scales = make(Residual)
    for ask in (pf.plan, pf.reachable, pf.CutPredictor):
        with pytest.raises(pf.ArgumentError, match=message):
            ask(model, X, scales, **limits)
