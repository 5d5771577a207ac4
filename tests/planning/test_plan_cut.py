"""A share to cut: reached after all limits, by as few channels as it takes; what is reachable."""

import itertools

import pytest
import torch
from support.nets import Bottlenecks, Branches, Grouped, Residual, SqueezeExcite, X, chain, settle
from support.planning import check_sizes, make, width
from torch import nn

import polarfast as pf
from polarfast.engine.models import build as build_model

NETS = [chain, Residual, Bottlenecks, Branches, Grouped, SqueezeExcite]
LIMITS = [
    {},
    {"round_to": 4},
    {"round_to": 3, "min_channels": 2, "max_share": 0.8},
    {"fold": "none", "round_to": 2},
    {"fold": "bias", "max_share": {"1": 0.5}},
]


def share(plan, of):
    cut = {"macs": plan.flops_reduction, "params": 1 - plan.params / plan.params_before}
    return cut[of]


def every_plan(model, scales, **limits):
    """The plans in which the k weakest channels go, for every k: made with thresholds."""
    order = torch.cat([gamma.detach().abs().float() for gamma in scales.values()]).sort().values
    bounds = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(order.tolist())), 2.0]
    return [pf.plan(model, X, scales, "fixed", value=bound, **limits) for bound in bounds]


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", NETS)
def test_as_few_channels_go_as_it_takes(build, residual):
    index = NETS.index(build) + ["keep", "expand", "couple"].index(residual)
    limits = LIMITS[index % len(LIMITS)]
    model, scales = make(build, residual, seed=index)
    plans = every_plan(model, scales, **limits)
    reach = pf.reachable(model, X, scales, **limits)
    for of, part in itertools.product(("macs", "params"), (0.0, 0.1, 0.37, 0.5, 0.8, 1.0)):
        shares = [share(other, of) for other in plans]
        assert getattr(reach, of) == (0.0, pytest.approx(shares[-1])) and shares[-1] > 0
        cut = part * shares[-1]
        plan = pf.plan(model, X, scales, cut=cut, of=of, **limits)
        assert share(plan, of) >= cut - 1e-12
        # One channel less would not be enough.
        steps = zip(plans, shares, [-1.0, *shares], strict=False)
        at = [other for other, now, before in steps if before < cut - 1e-12 <= now]
        assert any(
            all(torch.equal(plan.kept[name], other.kept[name]) for name in scales) for other in at
        )
    check_sizes(model, plan, X)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["expand", "couple"])
@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_a_resnet_within_one_step(residual, round_to):
    torch.manual_seed(0)
    model = settle(build_model("resnet20", 10, 3), torch.randn(4, 3, 32, 32)).float()
    x = torch.randn(1, 3, 32, 32)
    scales = pf.scaling_factors(model, x, residual=residual)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(-1, 1)
    limits = {"round_to": round_to, "max_share": 0.75}
    for cut in (0.05, 0.15, 0.3):
        plan = pf.plan(model, x, scales, cut=cut, **limits)
        assert plan.flops_reduction >= cut
        # The strongest of all channels that go stays: that is not enough.
        bound = max(layer.threshold for layer in plan.layers.values())
        weaker = torch.nextafter(torch.tensor(bound), torch.tensor(0.0)).item()
        less = pf.plan(model, x, scales, "fixed", value=weaker, **limits)
        assert less.flops_reduction < cut
        assert all(width(plan, name) % round_to == 0 for name in scales)
        check_sizes(model, plan, x)


@pytest.mark.parametrize("of", ["macs", "params"])
def test_equal_scores_are_told_apart(of):
    model, scales = make(Residual, "expand")
    with torch.no_grad():
        for gamma in scales.values():
            gamma.fill_(0.5)
    for cut in (0.2, 0.4, 0.6):
        plan = pf.plan(model, X, scales, cut=cut, of=of)
        assert cut <= share(plan, of) < cut + 0.1
        parts = [plan.kept[name].numel() / scales[name].numel() for name in scales]
        assert max(parts) - min(parts) <= 1 / 6  # the same share of every layer, to one channel
        for name, kept in plan.kept.items():
            assert kept.tolist() == list(range(kept.numel()))
            stay = f"{kept.numel()} equal to the threshold stay, the first ones"
            assert stay in plan.layers[name].note and plan.layers[name].threshold == 0.5


def test_three_quarters_of_zeros_and_less_is_asked_for():
    model, scales = make(chain)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[torch.arange(gamma.numel()) % 4 != 0] = 0
    zeros = pf.plan(model, X, scales, "fixed", value=0.0).flops_reduction
    plan = pf.plan(model, X, scales, cut=0.4)
    assert 0.4 <= plan.flops_reduction < 0.5 < zeros
    for name, gamma in scales.items():  # what is not zero stays
        assert set(gamma.nonzero()[:, 0].tolist()) < set(plan.kept[name].tolist())


def test_valleys_come_first():
    model, scales = make(chain)
    wide, narrow = list(scales)[1], list(scales)[0]
    with torch.no_grad():
        for gamma in scales.values():
            gamma.copy_(torch.linspace(0.6, 0.9, gamma.numel()))
        scales[narrow][:4] = torch.tensor([0.1, 0.11, 0.12, 0.13])  # under no valley: no gap above
        scales[narrow][4:] = torch.tensor([0.14, 0.15, 0.16, 0.17])
        scales[wide][:6] = 0.3
    valleys = pf.thresholds(scales)
    under = {name: int((scales[name].float() <= valleys[name]).sum()) for name in scales}
    first = pf.plan(model, X, scales)
    assert {n: first.kept[n].numel() for n in scales} == {
        n: scales[n].numel() - under[n] for n in scales
    }
    exactly = pf.plan(model, X, scales, "valley", cut=first.flops_reduction)
    assert all(torch.equal(exactly.kept[name], first.kept[name]) for name in scales)
    assert "above its valley" not in str(exactly)
    further = pf.plan(model, X, scales, "valley", cut=first.flops_reduction + 0.05)
    assert "above its valley go, to reach the share to cut" in str(further)
    assert all(set(further.kept[n].tolist()) <= set(first.kept[n].tolist()) for n in scales)
    with torch.no_grad():
        scales[wide][0] = -0.2
    with pytest.raises(pf.ThresholdError, match="1 negative"):
        pf.plan(model, X, scales, "valley", cut=0.1)
    assert pf.plan(model, X, scales, cut=0.1).flops_reduction >= 0.1


def test_scores_and_gates():
    model, scales = make(chain)
    generator = torch.Generator().manual_seed(5)
    scores = {n: torch.rand(g.numel(), generator=generator) for n, g in scales.items()}
    plan = pf.plan(model, X, scales, cut=0.5, scores=scores)
    assert 0.5 <= plan.flops_reduction < 0.6
    for name, score in scores.items():
        gone = sorted(set(range(score.numel())) - set(plan.kept[name].tolist()))
        assert all(score[plan.kept[name]].min() > score[i] for i in gone)
    bare = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)),
    ).double()
    pf.add_gates(bare, X)
    scales = pf.scaling_factors(bare, X)
    assert len(scales) == 2
    plan = pf.plan(bare, X, scales, cut=0.5, round_to=4)  # all gates are 1
    assert plan.flops_reduction >= 0.5
    assert all(plan.kept[name].numel() % 4 == 0 for name in scales)
    check_sizes(bare, plan, X)


def test_out_of_reach_is_told_beforehand():
    model, scales = make(chain)
    limits = {"round_to": 4, "max_share": 0.5}
    reach = pf.reachable(model, X, scales, **limits)
    everything = pf.plan(model, X, scales, "fixed", value=2.0, **limits)
    assert reach.macs == (0.0, everything.flops_reduction)
    assert reach.params == (0.0, 1 - everything.params / everything.params_before)
    assert list(reach.binding) == ["round_to=4", "max_share=0.5"]
    freer = pf.plan(model, X, scales, "fixed", value=2.0, round_to=4)
    assert reach.binding["max_share=0.5"][0] == freer.flops_reduction > reach.macs[1]
    assert "without max_share=0.5" in str(reach)
    low, high = f"{reach.macs[0]:.1%}", f"{reach.macs[1]:.1%}"
    message = rf"cut=0.9 of the MACs is out of reach: from {low} to {high} of the MACs.*round_to=4"
    with pytest.raises(pf.PlanError, match=message):
        pf.plan(model, X, scales, cut=0.9, **limits)
    at_most = pf.plan(model, X, scales, cut=reach.macs[1], **limits)
    assert at_most.flops_reduction == reach.macs[1]
    free = pf.reachable(model, X, scales)
    assert free.binding == {} and "no limit binds" in str(free)
    with pytest.raises(pf.PlanError, match="no limit binds"):
        pf.plan(model, X, scales, cut=0.999)
    assert pf.reachable(model, X, scales, max_share=1.0, min_channels=1).binding == {}


def test_arguments_that_do_not_go_together():
    model, scales = make(chain)
    for arguments, message in (
        ({"cut": 1.0}, r"cut=1.0: give the share to cut, in \[0, 1\)"),
        ({"cut": -0.1}, "cut=-0.1"),
        ({"cut": True}, "cut=True"),
        ({"cut": 0.5, "of": "flops"}, "of='flops': choose one of 'macs', 'params'"),
        ({"cut": 0.5, "value": 0.5}, "value=0.5 and cut=0.5"),
        ({"cut": 0.5, "method": "fixed"}, "method='fixed' with cut=0.5"),
        ({"cut": 0.5, "method": "median"}, "method='median' with cut=0.5"),
        ({"cut": 0.5, "fold": "all"}, "fold='all'"),
    ):
        with pytest.raises(pf.ArgumentError, match=message):
            pf.plan(model, X, scales, **arguments)
    with torch.no_grad():
        next(iter(scales.values()))[0] = float("nan")
    with pytest.raises(pf.ThresholdError, match="NaN"):
        pf.plan(model, X, scales, cut=0.5)
