"""A plan that fell short, or takes what is used, says so; so does a slim model of an old plan."""

import warnings

import pytest
import torch
from support.nets import chain

import polarfast as pf

X = torch.randn(2, 3, 12, 12)


def start():
    torch.manual_seed(0)
    model = chain().eval()
    return model, pf.scaling_factors(model, X)


def said(work):
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    assert all(w.filename == __file__ for w in caught), "they point at the user's line"
    return result, [str(w.message) for w in caught]


def test_nothing_polarized():
    model, scales = start()
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(0.4, 0.6)
    smallest = min(float(gamma.min()) for gamma in scales.values())
    plan, (warning,) = said(lambda: pf.plan(model, X, scales))
    assert f"0 of {scales.numel()} channels go, 0.0% of the MACs" in warning
    assert f"smallest is {smallest:.2g}" in warning and "FlopsTarget" in warning
    assert "all steps so far" not in warning
    assert warning == f"pf.plan: {plan.remarks[0]}" and plan.remarks[0] in str(plan)
    assert pf.PruningPlan.from_json(plan.to_json()).remarks == plan.remarks
    slim, (again,) = said(lambda: pf.slim(model, plan))
    assert "removes no channel" in again
    assert all(map(torch.equal, slim.parameters(), model.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_how_far_the_penalty_could_push(kind):
    model, scales = start()
    optimizer = kind(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).sum().backward()
        pf.step(optimizer, scales, pf.Polarization(1e-4, 1.2, upper=None))
    _, (warning,) = said(lambda: pf.plan(model, X, scales))
    known = f"all steps so far could move a γ by {3 * 1e-4 * 2.2 * 0.05:.2g}" in warning
    assert known == (kind is torch.optim.SGD)


def test_a_share_of_what_is_used():
    model, scales = start()
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(0.4, 0.6)
    plan, (warning,) = said(lambda: pf.plan(model, X, scales, cut=0.5))
    total = sum(float(gamma.sum()) for gamma in scales.values())
    stays = sum(float(gamma[plan.kept[name]].sum()) for name, gamma in scales.items())
    assert f"hold {1 - stays / total:.0%} of the sum of |γ|" in warning
    assert "expect a drop" in warning
    # Where those that go are at 0, there is nothing to say.
    with torch.no_grad():
        for name, gamma in scales.items():
            gone = torch.ones_like(gamma, dtype=torch.bool)
            gone[plan.kept[name]] = False
            gamma[gone] = 0.0
    assert said(lambda: pf.plan(model, X, scales, cut=0.5))[1] == []
    assert said(lambda: pf.plan(model, X, scales))[1] == []
    # Nor where another criterion than γ decides.
    scores = {name: torch.rand(gamma.numel()) for name, gamma in scales.items()}
    assert said(lambda: pf.plan(model, X, scales, cut=0.5, scores=scores))[1] == []


def test_equal_factors_told_apart_by_their_order():
    model, scales = start()
    pf.init_scales(scales, 0.5)
    _, warned = said(lambda: pf.plan(model, X, scales, cut=0.3))
    assert any("their order in the layer decided" in text for text in warned)


def test_a_percentile_of_what_is_used():
    model, scales = start()
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(0.4, 0.6)
    _, (warning,) = said(lambda: pf.plan(model, X, scales, "percentile", value=0.3))
    assert "expect a drop" in warning


def test_an_old_plan():
    model, scales = start()
    with torch.no_grad():
        for gamma in scales.values():
            gamma.fill_(0.3)
            gamma[::2] = 0.0
    plan = pf.plan(model, X, scales)
    assert said(lambda: pf.slim(model, plan))[1] == []
    assert said(lambda: pf.slim(model.bfloat16(), plan))[1] == [], "converted, not changed"
    model.float()
    with torch.no_grad():
        next(iter(scales.values()))[0] = 0.25
    _, (warning,) = said(lambda: pf.slim(model, plan))
    assert f"up to 0.25, in {next(iter(scales))}" in warning and "plan anew" in warning
    # A plan from a file does not know what γ were; what goes with them it sees.
    same = pf.PruningPlan.from_json(plan.to_json())
    _, (warning,) = said(lambda: pf.slim(model, same))
    assert f"up to 0.25, in {next(iter(scales))}" in warning and "is it trained" in warning


def trained(steps, told):
    """A few steps with a FlopsTarget that was told of more."""
    model, scales = start()
    reg = pf.FlopsTarget(model, X, scales, 0.3, steps=told)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 12, 12)).square().mean().backward()
        pf.step(optimizer, scales, reg)
    return model.eval(), scales, reg


def test_a_training_that_was_not_finished():
    for told, text in ((100, "it was told 100"), (None, "1,000 were assumed")):
        model, scales, reg = trained(15, told)
        plan, warned = said(lambda: pf.plan(model, X, scales))  # noqa: B023
        assert f"has taken 15 steps and {text}" in warned[0] and warned[0].endswith("or go on")
        assert plan.remarks[0] == reg.remark()
    model, scales, reg = trained(15, 15)
    assert reg.remark() is None


def test_what_goes_without_being_at_zero():
    model, scales = start()
    name, gamma = next(iter(scales.items()))
    with torch.no_grad():
        for each in scales.values():
            each[::2] = 0.0
        gamma[0] = 0.015
    _, (warning,) = said(lambda: pf.plan(model, X, scales, "fixed", value=0.02))
    assert f"γ that go are up to 0.015 (in {name}) and count as 0" in warning


def test_a_plan_of_another_model():
    model, scales = start()
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::2] = 0.0
    plan = pf.plan(model, X, scales)
    copied = chain().eval()
    copied.load_state_dict(model.state_dict())
    assert said(lambda: pf.slim(copied, plan))[1] == []
    fresh = chain().eval()
    for each in (plan, pf.PruningPlan.from_json(plan.to_json())):
        assert said(lambda: pf.slim(copied, each))[1] == []  # noqa: B023
        _, (warning,) = said(lambda: pf.slim(fresh, each))  # noqa: B023
        assert "the channels that go hold" in warning and "is it trained" in warning
