"""The Triton polarization kernels against float64 autograd and torch.optim.SGD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from support.oracles import (
    REGULARIZERS,  # noqa: E402
    subgradients,  # noqa: E402
)
from support.triton_harness import DEVICE, random_rows, table_of  # noqa: E402

from polarfast.kernels import polarize_triton  # noqa: E402
from polarfast.kernels.polarize_ref import KIND_DEEPHOYER, KIND_L1, KIND_POLARIZATION
from polarfast.kernels.table import ScaleTable  # noqa: E402

SIZES = [3, 64, 1500, 1]  # one row longer than a block, one of a single factor
WEIGHTS = [1.0, 0.5, 2.0, 1.25]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-13}


@pytest.fixture(params=["flat", "three launches"])
def plan(request, monkeypatch):
    """Both launch plans of the global mean, whatever the size."""
    if request.param == "three launches":
        monkeypatch.setattr(polarize_triton, "FLAT_SIZE", 0)


def add_subgradient(gammas, grads, kind, lam, t, per_layer, weights=None, grad_scale=None):
    table = table_of(gammas, grads, weights=weights)
    polarize_triton.add_subgradient_(table, kind, lam, t, per_layer, grad_scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)
def test_subgradient_is_that_of_autograd(kind, per_layer, dtype, plan):
    gammas = random_rows(SIZES, dtype)
    grads = random_rows(SIZES, dtype, seed=1)
    want = [
        g.double().cpu() + 0.1 * d
        for g, d in zip(grads, subgradients(gammas, WEIGHTS, kind, 1.2, per_layer), strict=True)
    ]
    add_subgradient(gammas, grads, kind, 0.1, 1.2, per_layer, WEIGHTS)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    ),
    t=st.floats(-2, 2),
)
def test_subgradient_with_ties(rows, t):
    """Few distinct values: factors that equal the mean, that are 0, that are all the same."""
    gammas = [torch.tensor(row, device=DEVICE) for row in rows]
    ones = [1.0] * len(rows)
    for kind, per_layer in REGULARIZERS[:3]:
        grads = [torch.zeros_like(g) for g in gammas]
        add_subgradient(gammas, grads, kind, 1.0, t, per_layer)
        want = subgradients(gammas, ones, kind, t, per_layer)
        for got, expected in zip(grads, want, strict=True):
            torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=1e-6)


def test_equal_factors_feel_only_the_l1_term(plan):
    """γ_i = 0.3 everywhere: the float64 mean is 0.3 to the last bit, and sgn(0) = 0."""
    gammas = [torch.full((n,), 0.3, device=DEVICE) for n in SIZES]
    grads = [torch.zeros_like(g) for g in gammas]
    add_subgradient(gammas, grads, KIND_POLARIZATION, 0.5, 1.5, False)
    assert all(torch.equal(g, torch.full_like(g, 0.75)) for g in grads)


def test_frozen_rows_count_and_stay(plan):
    gammas = random_rows(SIZES, torch.float32)
    grads = [torch.zeros_like(g) for g in gammas]
    before = [g.clone() for g in gammas]
    live = [grads[0], None, grads[2], None]
    want = subgradients(gammas, WEIGHTS, KIND_POLARIZATION, 1.2, False)
    add_subgradient(gammas, live, KIND_POLARIZATION, 1.0, 1.2, False, WEIGHTS)
    torch.testing.assert_close(grads[2].double().cpu(), want[2], rtol=0, atol=2e-6)
    table = table_of(gammas, live, weights=WEIGHTS)
    sgd_step(table, KIND_POLARIZATION, False, upper=0.1)
    polarize_triton.clamp_(table, 0.1)
    for row in (1, 3):
        assert torch.equal(gammas[row], before[row])
        assert not grads[row].any()
    assert not torch.equal(gammas[2], before[2])


def test_grad_scale_multiplies_the_subgradient(plan):
    gammas = random_rows(SIZES, torch.float32)
    plain, scaled = ([torch.zeros_like(g) for g in gammas] for _ in range(2))
    add_subgradient(gammas, plain, KIND_POLARIZATION, 1e-4, 1.2, False)
    scale = torch.tensor(1024.0, device=DEVICE)
    add_subgradient(gammas, scaled, KIND_POLARIZATION, 1e-4, 1.2, False, grad_scale=scale)
    assert all(torch.equal(s, 1024 * p) for p, s in zip(plain, scaled, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value")  # of inf / inf, in the interpreter
def test_rows_without_direction_under_deephoyer():
    """All γ = 0 in a layer: no subgradient; an infinite γ elsewhere does not leak into it."""
    gammas = [torch.zeros(5, device=DEVICE), torch.ones(3, device=DEVICE)]
    gammas[1][0] = float("inf")
    grads = [torch.ones_like(g) for g in gammas]
    add_subgradient(gammas, grads, KIND_DEEPHOYER, 1.0, 1.0, False)
    assert torch.equal(grads[0], torch.ones_like(grads[0]))


def test_infinite_factor_under_l1():
    """A term that L1 does not have must not be computed as 0 · inf."""
    gammas = [torch.tensor([float("inf"), -1.0], device=DEVICE)]
    grads = [torch.zeros(2, device=DEVICE)]
    add_subgradient(gammas, grads, KIND_L1, 0.5, 1.0, False)
    assert grads[0].tolist() == [0.5, -0.5]


def sgd_step(table, kind, per_layer, lam=0.02, t=1.2, **overrides):
    options = {
        "lr": 0.1,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "upper": None,
        "first_step": False,
    }
    polarize_triton.sgd_step_(table, kind, lam, t, per_layer, **{**options, **overrides})


SGD_OPTIONS = [
    {},
    {"weight_decay": 0.01, "upper": 1.0},
    {"momentum": 0.9, "weight_decay": 5e-4, "upper": 1.0},
    {"momentum": 0.9, "dampening": 0.5, "upper": 0.7},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.8, "maximize": True, "upper": 1.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_steps_are_those_of_torch(options, dtype, plan):
    """Six steps against torch.optim.SGD in float64, fed with ∂R by autograd, then clamped."""
    gammas = random_rows(SIZES, dtype)
    momenta = [torch.full_like(g, float("nan")) for g in gammas]  # as good as never written
    oracle = [g.double().cpu().requires_grad_() for g in gammas]
    hyper = {"lr": 0.1, **{k: v for k, v in options.items() if k != "upper"}}
    optimizer = torch.optim.SGD(oracle, **hyper)
    for step in range(6):
        grads = random_rows(SIZES, dtype, seed=step + 1)
        given_grads = [g.clone() for g in grads]
        table = table_of(gammas, grads, momenta, WEIGHTS)
        sgd_step(table, KIND_POLARIZATION, False, first_step=step == 0, **options)
        assert all(torch.equal(g, h) for g, h in zip(grads, given_grads, strict=True))
        sign = -0.02 if options.get("maximize") else 0.02
        ascent = subgradients(oracle, WEIGHTS, KIND_POLARIZATION, 1.2, False)
        for o, g, d in zip(oracle, grads, ascent, strict=True):
            o.grad = g.double().cpu() + sign * d
        optimizer.step()
        if "upper" in options:
            for o in oracle:
                o.data.clamp_(0, options["upper"])
        for got, expected in zip(gammas, oracle, strict=True):
            tolerance = 3e-6 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(
                got.double().cpu(), expected.detach(), rtol=0, atol=tolerance
            )


@pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sgd_step_in_half_precision(kind, per_layer, dtype):
    gammas = random_rows(SIZES, dtype)
    grads = random_rows(SIZES, dtype, seed=1)
    momenta = random_rows(SIZES, dtype, seed=2)
    ascent = subgradients(gammas, WEIGHTS, kind, 1.2, per_layer)
    want = [
        g.double().cpu() - 0.1 * (0.9 * m.double().cpu() + d.double().cpu() + 0.02 * a)
        for g, d, m, a in zip(gammas, grads, momenta, ascent, strict=True)
    ]
    sgd_step(table_of(gammas, grads, momenta, WEIGHTS), kind, per_layer, momentum=0.9)
    for got, expected in zip(gammas, want, strict=True):
        assert torch.equal(got.cpu(), expected.float().to(dtype)) or torch.allclose(
            got.double().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4
        )


def test_amp_scale_divides_and_found_inf_stops(plan):
    scale = torch.tensor(65536.0, device=DEVICE)
    start = random_rows(SIZES, torch.float32)
    grads = random_rows(SIZES, torch.float32, seed=1)
    plain, scaled, stopped = ([g.clone() for g in start] for _ in range(3))
    buffers = [torch.ones_like(g) for g in start]
    sgd_step(table_of(plain, grads), KIND_POLARIZATION, False)
    big = [g * scale for g in grads]
    fine = torch.zeros(1, device=DEVICE)
    sgd_step(table_of(scaled, big), KIND_POLARIZATION, False, grad_scale=scale, found_inf=fine)
    assert all(torch.equal(p, s) for p, s in zip(plain, scaled, strict=True))
    table = table_of(stopped, grads, buffers)
    found = torch.ones(1, device=DEVICE)
    sgd_step(table, KIND_POLARIZATION, False, momentum=0.9, upper=0.1, found_inf=found)
    polarize_triton.clamp_(table, 0.1, found)
    assert all(torch.equal(p, s) for p, s in zip(stopped, start, strict=True))
    assert all(torch.equal(b, torch.ones_like(b)) for b in buffers)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_clamp_is_that_of_torch(dtype):
    gammas = random_rows(SIZES, dtype)
    gammas[0][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    want = [g.clone().clamp_(0, 0.75) for g in gammas]
    polarize_triton.clamp_(table_of(gammas, gammas), 0.75)
    for got, expected in zip(gammas, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_same_bits_every_time(plan):
    results = []
    for _ in range(2):
        gammas = random_rows(SIZES, torch.float32)
        sgd_step(table_of(gammas, random_rows(SIZES, torch.float32, 1)), KIND_POLARIZATION, False)
        results.append(torch.cat(gammas))
    assert torch.equal(*results)


@pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)
def test_both_backends_of_the_table_agree(kind, per_layer):
    results = []
    for backend, device in (("cpu", "cpu"), ("triton", DEVICE)):
        params = [torch.nn.Parameter(row.to(device)) for row in random_rows(SIZES, torch.float32)]
        for param, grad in zip(params, random_rows(SIZES, torch.float32, seed=1), strict=True):
            param.grad = grad.to(device)
        params[1].requires_grad_(False)
        table = ScaleTable(list("abcd"), params, WEIGHTS, backend=backend)
        table.add_subgradient_(kind, 0.1, 1.2, per_layer)
        table.sgd_step_(kind, 0.1, 1.2, per_layer, lr=0.5, weight_decay=0.01, upper=0.9)
        table.clamp_(0.8)
        results.append([x.detach().cpu() for p in params for x in (p, p.grad)])
        results[-1] += [x.cpu() for x in table.valley()]
    for cpu, other in zip(*results, strict=True):
        torch.testing.assert_close(other, cpu, rtol=0, atol=1e-6, equal_nan=True)
