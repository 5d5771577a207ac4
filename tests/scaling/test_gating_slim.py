"""The slim model has taken its gates in, and equals the network with gates of 0."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gating import NETS, X, bare, is_plain, make
from support.masked import TOLERANCE, error, masked
from support.nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    chain,
    settle,
)
from torch import nn

import polarfast as pf


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", [*NETS, bare])
def test_zero_gates_are_exact(build, residual):
    model, scales = make(build, residual)
    for fold in ("exact", "bias", "none"):  # a gate silences β: they are one
        plan = pf.plan(model, X, scales, method="fixed", fold=fold)
        assert not plan.inexact and plan.macs < plan.macs_before
        slim = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
        assert error(masked(model, plan), slim, floor=1e-3) < TOLERANCE
        assert pf.verify(model, slim, plan, X).exact
        assert is_plain(slim, build())
        assert plan.params == sum(p.numel() for p in slim.parameters())
        assert plan.params_before == sum(p.numel() for p in build().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
def test_mobilenet_with_beta_is_exact(residual, tmp_path):
    models = pytest.importorskip("torchvision").models

    def build() -> nn.Module:
        return models.mobilenet_v2(num_classes=7, width_mult=0.25)

    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model = settle(build(), x)
    scales = pf.add_gates(model, x, residual=residual)
    with torch.no_grad():
        for gate in scales.values():
            gate[torch.randperm(gate.numel())[: gate.numel() // 2]] = 0
    plan = pf.plan(model, x, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact and plan.flops_reduction > 0.3
    with torch.no_grad():
        a, b = masked(model, plan)(x), slim(x)
    assert float((a - b).abs().max() / (a.amax(0) - a.amin(0)).max()) < TOLERANCE
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", build=lambda: build().double()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), b)
    assert is_plain(loaded, build())


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Softplus])
def test_activations_that_do_not_vanish_at_zero(act, padding):
    model, scales = make(lambda: chain(act, 3, padding))
    plan = pf.plan(model, X, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert error(masked(model, plan), slim, floor=1e-3) < TOLERANCE
    # act(0) through zero padding needs a constant channel; it stays silent in fine-tuning.
    constant = plan.layers["1.gate"].constant
    assert len(constant) == padding
    place = [sorted([*plan.kept["1.gate"].tolist(), *constant]).index(c) for c in constant]
    assert slim[1].weight[place].tolist() == [0.0] * padding
    assert slim[1].bias[place].tolist() == [1.0] * padding


def test_bare_layers_take_constants_into_their_bias():
    model, scales = make(lambda: bare(nn.Sigmoid, kernel=1))
    plan = pf.plan(model, X, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert slim[5].bias is not None and model[5].bias is None  # created, behind its gate
    assert error(masked(model, plan), slim, floor=1e-3) < TOLERANCE
    assert plan.params == sum(p.numel() for p in slim.parameters())


def test_constants_that_are_not_exact_at_the_border_are_what_the_plan_says():
    model, scales = make(lambda: bare(nn.Sigmoid))
    plan = pf.plan(model, X, scales, method="fixed")
    assert "5.weight" in plan.inexact  # which gets a bias, behind its gate
    slim = pf.slim(model, plan)  # verified: what the readers see is the interior value
    assert slim[5].bias is not None and model[5].bias is None


@pytest.mark.parametrize("build", [*NETS, bare])
def test_gates_fold_without_pruning(build):
    model = build()
    scales = pf.add_gates(model, X.float(), residual="couple")
    with torch.no_grad():
        for gate in scales.values():
            gate.uniform_(0.3, 1.0)
    plan = pf.plan(model, X.float(), scales, method="fixed")
    assert plan.flops_reduction == 0
    slim = pf.slim(model.eval(), plan)
    assert is_plain(slim, build())
    assert [type(m) for m in slim.modules()] == [type(m) for m in build().modules()]
    a, b = model(X.float()), slim(X.float())
    # γ·gate is the number that the gated norm computes with.
    assert torch.equal(a, b) or (build is bare and torch.allclose(a, b, atol=1e-6))
    build().load_state_dict(slim.state_dict())


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    build=st.sampled_from([chain, Residual, Branches, Grouped, bare]),
    residual=st.sampled_from(["keep", "expand", "couple"]),
    fold=st.sampled_from(["exact", "none"]),
    share=st.floats(0.0, 0.6),
    chosen=st.integers(0, 2**10),
    seed=st.integers(0, 2**16),
)
def test_gates_beside_gammas(build, residual, fold, share, chosen, seed):
    """Some layers pruned by their gates, the others by their γ."""
    model = settle(build(), torch.randn(4, 3, 10, 10), seed=seed)
    every = [
        name.removesuffix(".gate")
        for name in pf.add_gates(copy.deepcopy(model), X, residual=residual)
    ]
    subset = [name for i, name in enumerate(every) if chosen >> i & 1] or every
    gates = pf.add_gates(model, X, subset, residual)
    assert sorted(gates) == sorted(f"{name}.gate" for name in subset)
    scales = pf.scaling_factors(model, X, residual)
    assert set(gates) <= set(scales)
    with torch.no_grad():
        for factor in scales.values():
            factor.uniform_(0.3, 1.0)
            factor[torch.randperm(factor.numel())[: int(share * factor.numel())]] = 0
    plan = pf.plan(model, X, scales, method="fixed", fold=fold)
    reference = masked(model, plan)
    with torch.no_grad():
        for name, kept in plan.kept.items():
            beta = name.removesuffix("weight") + "bias"
            if fold == "none" and name.endswith(".weight"):
                keep = torch.zeros(plan.layers[name].channels)
                keep[kept] = 1
                reference.get_parameter(beta).mul_(keep)
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert is_plain(slim, build())
    assert error(reference, slim, floor=1e-3) < TOLERANCE


@pytest.mark.parametrize("build", [Bottlenecks, bare, lambda: chain(nn.Sigmoid)])
def test_the_predicted_cut_is_the_plans(build):
    model, scales = make(build, "expand")
    predictor = pf.CutPredictor(model, X, scales, method="fixed")
    assert predictor.cut() == pf.plan(model, X, scales, method="fixed").flops_reduction > 0


def test_optimizer_loses_its_gates():
    model, scales = make(Residual, "expand")
    named = [(n, p) for n, p in model.named_parameters()]
    gates = [(n, p) for n, p in named if n in scales]
    rest = [(n, p) for n, p in named if n not in scales]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": gates, "weight_decay": 0.0}], lr=0.01
    )
    model.train()(X).square().sum().backward()
    optimizer.step()
    plan = pf.plan(model, X, scales, method="fixed", value=0.1)
    slim = pf.slim(model, plan, optimizer=optimizer)
    ours = {id(p) for p in slim.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == ours
    assert {id(p) for p in optimizer.state} == ours
    assert not any("gate" in n for group in optimizer.param_groups for n in group["param_names"])
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())
    slim.train()(X).square().sum().backward()
    optimizer.step()
