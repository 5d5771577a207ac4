"""The plan: thresholds, limits, layers that would lose everything, and the text format."""

import json

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.masked import TOLERANCE, error, masked
from support.nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    X,
    chain,
    conv_bn,
    empty,
    prepared,
    zero,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf

NETS = [chain, Residual, Bottlenecks, Branches, Grouped]


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "bias", "none"])
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", NETS)
def test_predicted_sizes_are_those_of_the_built_model(build, residual, fold):
    model, scales = prepared(build, residual)
    plan = pf.plan(model, X, scales, fold=fold)
    slim = pf.slim(model, plan)
    with FlopCounterMode(display=False) as counter:
        slim(X)
    assert plan.macs == counter.get_total_flops() // 2 < plan.macs_before
    assert plan.params == sum(param.numel() for param in slim.parameters())
    assert plan.params_before == sum(param.numel() for param in model.parameters())
    assert plan.flops_reduction == pytest.approx(1 - plan.macs / plan.macs_before)


def test_valley_thresholds_decide():
    model, scales = prepared(chain)
    plan = pf.plan(model, X, scales)
    found = pf.thresholds(scales)
    for name, gamma in scales.items():
        wanted = (gamma.float() > found[name]).nonzero().flatten()
        assert torch.equal(plan.kept[name], wanted)
        assert plan.layers[name].threshold == found[name]


def test_fixed_and_percentile():
    model, scales = prepared(chain)
    plan = pf.plan(model, X, scales, method="fixed", value=0.7)
    for name, gamma in scales.items():
        assert torch.equal(plan.kept[name], (gamma > 0.7).nonzero().flatten())
    plan = pf.plan(model, X, scales, method="percentile", value=0.6)
    assert sum(kept.numel() for kept in plan.kept.values()) == 20 - 12


def test_an_unpolarized_network_loses_nothing_and_no_valley_is_told():
    model, scales = prepared(chain, share=0)
    plan = pf.plan(model, X, scales)
    assert plan.macs == plan.macs_before and plan.flops_reduction == 0
    wide = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6000, 1), torch.nn.BatchNorm2d(6000), torch.nn.Conv2d(6000, 2, 1)
    ).double()
    scales = pf.scaling_factors(wide, X)
    # A histogram that falls from bin to bin, strictly, has no valley.
    counts = torch.arange(100, 0, -1)
    edges = (torch.arange(100) + 0.5) / 100
    with torch.no_grad():
        wide[1].weight.fill_(1.5)[: int(counts.sum())] = edges.repeat_interleave(counts).double()
    plan = pf.plan(wide, X, scales)
    assert plan.kept["1.weight"].numel() == 6000
    assert "no valley" in plan.layers["1.weight"].note and "no valley" in str(plan)


@pytest.mark.parametrize("build", [chain, Branches])
def test_the_last_channel_of_a_chain_stays(build):
    model, scales = prepared(build, share=0)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.zero_()[3] = 0.005  # the strongest, under the threshold too
        for name in scales:  # nothing dies in a ReLU
            model.get_parameter(name.replace("weight", "bias")).fill_(1.0)
    plan = pf.plan(model, X, scales)
    stem = next(iter(scales))
    assert plan.kept[stem].tolist() == [3]
    assert "would lose everything" in plan.layers[stem].note
    slim = pf.slim(model, plan)
    report = pf.verify(model, slim, plan, X)
    assert report.exact and report.variation > 0


def test_of_parallel_branches_one_may_go_but_not_all():
    model, scales = prepared(Branches, share=0)
    empty(scales, ["left.1.weight"])
    plan = pf.plan(model, X, scales)
    assert plan.kept["left.1.weight"].numel() == 0 and plan.kept["right.2.weight"].numel() == 6
    empty(scales, ["right.2.weight"])
    strongest = [("left.1.weight", 4), ("right.2.weight", 2)]
    for name, place in strongest:
        with torch.no_grad():
            scales[name][place] += 0.004  # under the threshold; right's is at last the larger one
            scales["right.2.weight"][2] += 0.001
        plan = pf.plan(model, X, scales)
        kept = {n: plan.kept[n].tolist() for n, _ in strongest}
        assert kept == {**dict.fromkeys(kept, []), name: [place]}


@pytest.mark.parametrize("own", [False, True])
def test_a_branch_goes_only_where_each_of_its_layers_works_without_channels(own):
    class Own(nn.Conv2d):
        """Of its kind, nobody knows what it does on none."""

        def forward(self, x):
            return super().forward(x) * 1.0

    def build():
        net = Residual()
        if own:
            net.first[3] = Own(6, 8, 3, padding=1, bias=False)
        return net

    model, scales = prepared(build, "expand", share=0)
    empty(scales, ["first.4.weight"])
    plan = pf.plan(model, X, scales)
    assert plan.kept["first.4.weight"].numel() == own
    assert ("would lose everything" in plan.layers["first.4.weight"].note) == own
    assert error(masked(model, plan), pf.slim(model, plan)) < TOLERANCE


def test_a_branch_that_disappears():
    model, scales = prepared(Residual, "expand")
    empty(scales, ["first.4.weight"])
    plan = pf.plan(model, X, scales)
    # What only the emptied convolution read goes with it, whatever its γ.
    assert plan.kept["first.4.weight"].numel() == plan.kept["first.1.weight"].numel() == 0
    assert "branch disappears" in str(plan)
    slim = pf.slim(model, plan)
    with FlopCounterMode(display=False) as counter:
        slim(X)
    assert not any(
        "first" in name for name in counter.get_flop_counts() if counter.flop_counts[name]
    )
    assert pf.verify(model, slim, plan, X).exact
    kept = pf.plan(model, X, scales, min_channels=2)
    assert kept.kept["first.4.weight"].numel() == 2


@pytest.mark.slow
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    share=st.floats(0, 1),
    round_to=st.sampled_from([1, 2, 4, 8, 16]),
    min_channels=st.integers(1, 6),
    residual=st.sampled_from(["keep", "expand", "couple"]),
    seed=st.integers(0, 99),
)
def test_limits_hold_and_only_add_back(share, round_to, min_channels, residual, seed):
    model, scales = prepared(Residual, residual, share=0, seed=seed)
    zero(scales, share, seed)
    free = pf.plan(model, X, scales)
    plan = pf.plan(model, X, scales, round_to=round_to, min_channels=min_channels)
    for name, gamma in scales.items():
        kept, full = plan.kept[name], gamma.numel()
        width = kept.numel() + len(plan.layers[name].constant)
        if width:
            assert width % round_to == 0 or width == full
        if kept.numel():
            assert kept.numel() >= min(min_channels, full)
        if min_channels > 1 or free.kept[name].numel():
            assert set(free.kept[name].tolist()) <= set(kept.tolist())
    slim = pf.slim(model, plan)
    with FlopCounterMode(display=False) as counter:
        slim(X)
    assert plan.macs == counter.get_total_flops() // 2


def test_valleys_without_a_gap_are_noted():
    parts = [*conv_bn(3, 12), nn.ReLU(), *conv_bn(12, 12), nn.ReLU(), *conv_bn(12, 12), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).double()
    scales = pf.scaling_factors(model, X)
    first, second, third = scales.values()

    def notes(**options):
        return [layer.note for layer in pf.plan(model, X, scales, **options).layers.values()]

    with torch.no_grad():
        for gamma in scales.values():  # parted: the smallest of those that stay is far above
            gamma.copy_(torch.linspace(0.3, 0.9, 12))
            gamma[:3] = torch.tensor([0.0, 0.004, 0.008])
        assert notes() == ["", "", ""]
        first.copy_(torch.linspace(0.02, 0.06, 12))  # nothing goes, so nothing is missed
        second[3:7] = 0.05  # of 9 that stay, some are on their way
        third.copy_(torch.linspace(0.003, 0.09, 12))
    plan = pf.plan(model, X, scales)
    assert [kept.numel() for kept in plan.kept.values()][:2] == [12, 9]
    limit = plan.layers[list(scales)[2]].threshold
    above = [gamma for gamma in third.tolist() if gamma > limit]
    near = sum(gamma <= limit + 0.05 for gamma in above)
    said = f"no gap: {near} of {len(above)} above the threshold lie within 0.05 of it"
    assert 12 > len(above) >= near > 1
    assert notes() == ["", "", said] and said in str(plan)
    with torch.no_grad():
        second[7] = 0.05
    assert notes()[1] == "no gap: 5 of 9 above the threshold lie within 0.05 of it"
    assert notes(method="fixed", value=limit) == ["", "", ""]


@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
def test_json_round_trip(residual):
    model, scales = prepared(Residual, residual)
    plan = pf.plan(model, X, scales)
    text = plan.to_json()
    again = pf.PruningPlan.from_json(text)
    assert again.to_json() == text and str(again) == str(plan)
    assert all(torch.equal(again.kept[name], plan.kept[name]) for name in plan.kept)
    assert json.loads(text)["version"] == 1
    for (name, a), b in zip(
        pf.slim(model, plan).state_dict().items(),
        pf.slim(model, again).state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name


def test_damaged_plans_are_refused():
    model, scales = prepared(chain)
    text = pf.plan(model, X, scales).to_json()
    with pytest.raises(pf.PlanError, match="not a pruning plan"):
        pf.PruningPlan.from_json("hello")
    with pytest.raises(pf.PlanError, match="not a pruning plan"):
        pf.PruningPlan.from_json("[]")
    with pytest.raises(pf.PlanError, match="version 99"):
        pf.PruningPlan.from_json(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(pf.PlanError, match="damaged"):
        pf.PruningPlan.from_json(text.replace('"layers"', '"layer"'))
    data = json.loads(text)
    data["layers"]["1.weight"]["kept"] = [[0, 99]]
    with pytest.raises(pf.PlanError, match="damaged.*1.weight"):
        pf.PruningPlan.from_json(json.dumps(data))


def test_arguments_are_checked():
    model, scales = prepared(chain)
    with pytest.raises(pf.ArgumentError, match="round_to=0"):
        pf.plan(model, X, scales, round_to=0)
    with pytest.raises(pf.ArgumentError, match="min_channels=-1"):
        pf.plan(model, X, scales, min_channels=-1)
    with pytest.raises(pf.ArgumentError, match="fold='all'"):
        pf.plan(model, X, scales, fold="all")
    with pytest.raises(pf.PlanError, match="not a parameter of this model"):
        pf.plan(prepared(chain)[0], X, scales)
    with pytest.raises(pf.ArgumentError, match="method"):
        pf.plan(model, X, scales, method="median")


def test_mac_weights_are_what_a_channel_costs():
    """Counted by FlopCounterMode on networks with one channel less, then rescaled."""
    from torchvision.models import resnet18

    x = torch.randn(1, 3, 64, 64)

    def net(first, second):
        return nn.Sequential(
            *(nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 5, stride=2), nn.BatchNorm2d(second), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 7)),
        ).eval()

    def macs(*widths):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(*widths)(x)
        return counter.get_total_flops() / 2

    model = net(6, 9)
    scales = pf.scaling_factors(model, x)
    found = list(pf.mac_weights(model, x, scales, 0.2, 2.0).values())
    saved = [macs(6, 9) - macs(5, 9), macs(6, 9) - macs(6, 8)]
    assert sorted(found) == pytest.approx([0.2, 2.0])
    assert (found[0] > found[1]) == (saved[0] > saved[1])
    residual = resnet18(num_classes=10).eval()
    scales = pf.scaling_factors(residual, x, residual="expand")
    weights = pf.mac_weights(residual, x, scales)
    assert set(weights) == set(scales)
    assert min(weights.values()) == 0.5 and max(weights.values()) == 1.5
    pf.Polarization(1e-4, 1.2, weights=weights).value(scales)
    with pytest.raises(pf.ArgumentError, match="low=2"):
        pf.mac_weights(residual, x, scales, 2.0, 1.0)


def test_a_plan_that_another_program_copied():
    """1.0 comes back as 1 from some."""
    model, scales = prepared(Bottlenecks, "expand")
    plan = pf.plan(model, X, scales, "fixed")
    data = json.loads(plan.to_json())
    assert 0.0 in data["pinned_macs"].values()
    data["pinned_macs"] = {
        name: 0 if not part else part for name, part in data["pinned_macs"].items()
    }
    assert pf.PruningPlan.from_json(json.dumps(data)).kept.keys() == plan.kept.keys()
