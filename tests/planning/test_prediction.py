"""The predicted share of MACs against the plan made anew; scores other than γ."""

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
    chain,
    empty,
    prepared,
    zero,
)
from torch import nn

import polarfast as pf
from polarfast.engine.models import build

X = torch.randn(2, 3, 12, 12)
NETS = {
    "chain": chain,
    "hardswish": lambda: chain(nn.Hardswish),
    "sigmoid": lambda: chain(nn.Sigmoid),
    "residual": Residual,
    "bottlenecks": Bottlenecks,
    "branches": Branches,
    "grouped": Grouped,
    "squeeze-excite": SqueezeExcite,
    "resnet20": lambda: build("resnet20", 10, 3),
}


def make(name, residual="keep", dtype=torch.float32):
    return prepared(NETS[name], residual, share=0, dtype=dtype, x=X)


@torch.no_grad()
def scatter(model, scales, seed):
    """γ as after training, some layers emptied; β anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    for name, gamma in scales.items():
        gone = draw(gamma.numel()) < float(draw()) * 1.2 - 0.1
        gamma.copy_(torch.where(gone, 0.004 * draw(gamma.numel()), 0.2 + draw(gamma.numel())))
        beta = model.get_parameter(name.removesuffix("weight") + "bias")
        beta.copy_(4 * draw(beta.numel()) - 2 + 6 * draw() - 3)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("name", NETS)
def test_the_prediction_is_the_plan_s(name, residual):
    model, scales = make(name, residual)
    predictor = pf.CutPredictor(model, X, scales)
    assert predictor.cut() == pf.plan(model, X, scales).flops_reduction == 0
    for seed in range(2 if name == "resnet20" else 6):
        scatter(model, scales, seed)
        assert predictor.cut() == pf.plan(model, X, scales).flops_reduction


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "bias", "none"])
@pytest.mark.parametrize(
    ("method", "value"), [("valley", None), ("fixed", 0.5), ("percentile", 0.4)]
)
@pytest.mark.parametrize("limits", [(1, 1), (4, 1), (1, 3)])
def test_methods_folds_and_limits(fold, method, value, limits):
    round_to, least = limits
    options = {"value": value, "fold": fold, "round_to": round_to, "min_channels": least}
    for name in ("chain", "residual"):
        model, scales = make(name, "expand", torch.float64)
        predictor = pf.CutPredictor(model, X.double(), scales, method, **options)
        for seed in range(3):
            scatter(model, scales, seed)
            plan = pf.plan(model, X.double(), scales, method, **options)
            assert predictor.cut() == plan.flops_reduction


MODEL, SCALES = make("resnet20", "expand")
PREDICTOR = pf.CutPredictor(MODEL, X, SCALES)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**9), emptied=st.sets(st.integers(0, 17), max_size=4))
def test_any_state_of_a_resnet(seed, emptied):
    scatter(MODEL, SCALES, seed)
    empty(SCALES, [list(SCALES)[row] for row in emptied])
    assert PREDICTOR.cut() == pf.plan(MODEL, X, SCALES).flops_reduction


def test_layers_left_out_and_gammas_that_move():
    model, scales = make("residual", "expand")
    some = scales.select("first")
    predictor = pf.CutPredictor(model, X, some)
    zero(scales)
    assert predictor.cut() == pf.plan(model, X, some).flops_reduction > 0
    model.double()
    assert predictor.cut() == pf.plan(model, X.double(), some).flops_reduction


def test_scores_in_the_place_of_gammas():
    model, scales = make("residual", "expand", torch.float64)
    x = X.double()
    predictor = pf.CutPredictor(model, x, scales, "percentile", value=0.4)
    generator = torch.Generator().manual_seed(3)  # nothing is added back for the limits
    scores = {
        name: torch.rand(gamma.shape, generator=generator, dtype=torch.float64)
        for name, gamma in scales.items()
    }
    plan = pf.plan(model, x, scales, "percentile", value=0.4, scores=scores)
    order = torch.cat(list(scores.values())).float().sort().values
    bound = order[14 - 1]  # 0.4 of 36
    for name, score in scores.items():
        assert plan.kept[name].tolist() == (score.float() > bound).nonzero()[:, 0].tolist()
    assert predictor.cut(scores) == plan.flops_reduction > 0
    assert predictor.cut(scores) != predictor.cut()
    slim = pf.slim(model, plan)
    masked = make("residual", "expand", torch.float64)[0]
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, kept in plan.kept.items():
            gone = torch.ones(scales[name].numel(), dtype=torch.bool)
            gone[kept] = False
            masked.get_parameter(name)[gone] = 0
    torch.testing.assert_close(slim(x), masked(x), rtol=1e-9, atol=1e-9)


def test_valleys_of_scores():
    model, scales = make("chain")
    scores = {name: torch.ones_like(gamma) for name, gamma in scales.items()}
    for score in scores.values():
        score[:3] = 0.001
    plan = pf.plan(model, X, scales, scores=scores)
    assert [kept.tolist()[0] for kept in plan.kept.values()] == [3] * len(scales)
    assert pf.CutPredictor(model, X, scales).cut(scores) == plan.flops_reduction > 0


def test_scores_that_do_not_fit_are_refused():
    model, scales = make("chain")
    predictor = pf.CutPredictor(model, X, scales)
    good = {name: torch.ones_like(gamma) for name, gamma in scales.items()}
    first = next(iter(scales))
    bad = [
        ({k: v for k, v in good.items() if k != first}, "lack"),
        ({**good, "stem": torch.ones(3)}, "no such layer"),
        ({**good, first: torch.ones(3)}, "give a tensor"),
        ({**good, first: [1.0] * 8}, "give a tensor"),
        ({**good, first: -good[first]}, "finite"),
        ({**good, first: good[first] / 0}, "finite"),
    ]
    for scores, message in bad:
        with pytest.raises(pf.ArgumentError, match=message):
            pf.plan(model, X, scales, scores=scores)
        with pytest.raises(pf.ArgumentError, match=message):
            predictor.cut(scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "bottlenecks", "squeeze-excite"])
def test_counts_for_a_share_of_macs_with_a_usual_one(name):
    model, scales = make(name, "expand")
    scatter(model, scales, 3)
    predictor = pf.CutPredictor(model, X, scales)
    compared = predictor.look()
    first = next(iter(compared))
    held = {first: 0.1}
    order = torch.cat([values for n, values in compared.items() if n != first]).sort().values

    def share(count):
        """Of a plan, by scores that say which channels go."""
        limit = order[count - 1] if count else -1.0
        stays = {n: (v > (held[n] if n in held else limit)).float() for n, v in compared.items()}
        return pf.plan(model, X, scales, "fixed", value=0.5, scores=stays).flops_reduction

    best = predictor.count_for(0.3, compared, held=held)
    assert best == predictor.count_for(0.3, compared, held=held, order=order)
    off = abs(share(best) - 0.3)
    for usual in range(1, order.numel(), 3):
        for slack in (0.0, 0.02, 0.2):
            expected = usual if abs(share(usual) - 0.3) <= off + slack else best
            assert predictor.count_for(0.3, compared, usual, slack, held, order) == expected


def test_arguments_are_checked():
    model, scales = make("chain")
    with pytest.raises(pf.ArgumentError, match="method"):
        pf.CutPredictor(model, X, scales, "median")
    with pytest.raises(pf.ArgumentError, match="value=0.5: 'valley'"):
        pf.CutPredictor(model, X, scales, value=0.5)
    with pytest.raises(pf.ArgumentError, match="value=-1"):
        pf.CutPredictor(model, X, scales, "fixed", value=-1.0)
    with pytest.raises(pf.ArgumentError, match="'percentile' needs the share"):
        pf.CutPredictor(model, X, scales, "percentile")
    with pytest.raises(pf.ArgumentError, match="round_to=0"):
        pf.CutPredictor(model, X, scales, round_to=0)
    with pytest.raises(pf.PlanError, match="not a parameter of this model"):
        pf.CutPredictor(make("chain")[0], X, scales)
    predictor = pf.CutPredictor(model, X, scales)
    with torch.no_grad():
        next(iter(scales.values()))[0] = float("nan")
    with pytest.raises(pf.ThresholdError, match="NaN"):
        predictor.cut()


def test_gammas_are_looked_at_when_a_prediction_is_made_and_not_before():
    model, scales = make("chain")
    with torch.no_grad():
        next(iter(scales.values()))[0] = -0.1
    predictor = pf.CutPredictor(model, X, scales)
    with pytest.raises(pf.ThresholdError, match="1 negative"):
        predictor.cut()
    reg = pf.FlopsTarget(model, X, scales, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().sum().backward()
    with pytest.warns(UserWarning, match=r"1 values in 1 of .* are clamped from now on"):
        pf.step(optimizer, scales, reg)
    assert predictor.cut() == pf.plan(model, X, scales).flops_reduction
