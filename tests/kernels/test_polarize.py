"""Subgradient, clamp and fused SGD step, on every backend, against autograd and torch.optim.SGD."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import (
    BACKENDS,
    TOLERANCE,
    assert_close,
    bits,
    device_of,
    random_gammas,
    table_of,
)
from support.oracles import DEEPHOYER, POLARIZATION, REGULARIZERS, PlainTraining, subgradients

from polarfast.kernels import polarize

SIZES = [3, 64, 130, 1]
WEIGHTS = [1.0, 0.5, 2.0, 1.25]
FROZEN = 2

both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_regularizers = pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)


# --- (a) subgradient ---------------------------------------------------------------------------


@both_backends
@all_regularizers
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_subgradient_is_that_of_autograd(backend, kind, per_layer, dtype):
    params = random_gammas(SIZES, dtype, device_of(backend))
    params[FROZEN].requires_grad_(False)
    lam, t, scale = 0.1, 1.2, 4.0
    want = [
        param.grad.double().cpu() + (0 if i == FROZEN else scale * lam * added)
        for i, (param, added) in enumerate(
            zip(params, subgradients(params, WEIGHTS, kind, t, per_layer), strict=True)
        )
    ]
    table = table_of(params, backend, WEIGHTS)
    grad_scale = torch.tensor(scale, device=device_of(backend))
    table.add_subgradient_(kind, lam, t, per_layer, grad_scale)
    assert_close([param.grad for param in params], want, dtype)


@both_backends
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    ),
    t=st.floats(-2, 2),
    per_layer=st.booleans(),
)
def test_subgradient_with_ties(backend, rows, t, per_layer):
    """γ that equal the mean, that are 0, that are all the same: sgn(0) = 0."""
    params = [torch.nn.Parameter(torch.tensor(row, device=device_of(backend))) for row in rows]
    for param in params:
        param.grad = torch.zeros_like(param)
    weights = [1.0 + i for i in range(len(rows))]
    want = subgradients(params, weights, POLARIZATION, t, per_layer)
    table_of(params, backend, weights).add_subgradient_(POLARIZATION, 1.0, t, per_layer)
    assert_close([param.grad for param in params], want)


def test_comparison_with_the_mean_is_in_double():
    """The mean lies between two float32 neighbours: rounded to float32 it would equal one of them
    and that γ would count as 0."""
    low = torch.tensor(0.5)
    high = torch.nextafter(low, torch.tensor(1.0))
    param = torch.nn.Parameter(torch.stack([low, low, high]))
    param.grad = torch.zeros(3)
    table_of([param], "cpu").add_subgradient_(POLARIZATION, 1.0, 0.0, False)
    assert_close([param.grad], [torch.tensor([2 / 3, 2 / 3, -4 / 3])])


def test_deephoyer_of_a_layer_of_zeros_is_zero():
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.zeros(4)
    table_of([param], "cpu").add_subgradient_(DEEPHOYER, 1.0, 0.0, False)
    assert torch.equal(param.grad, torch.zeros(4))


# --- properties of R_s, through R_s(γ) = γ · ∂R_s(γ): it is positively homogeneous of degree 1 ----


def polarization(values, t):
    gamma = torch.tensor(values, dtype=torch.float64)
    grad = torch.zeros_like(gamma)
    polarize.add_subgradient_([gamma], [grad], [], POLARIZATION, 1.0, t)
    return float(gamma @ grad)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("t", [-2.5, -1.0, 0.0, 0.7, 1.2, 1.9, 2.5])
def test_theorem_3_2_by_enumeration(n, t):
    """R_s is concave: its minimum on [0, a]^n is at a vertex, with floor(nρ) or one more at a."""
    upper = 0.75
    # Which of the n are at `upper` does not matter (below); every count of them is enumerated.
    values = [polarization([upper] * k + [0.0] * (n - k), t) for k in range(n + 1)]
    rho = 0.0 if t > 2 else 1.0 if t < -2 else 0.5 - t / 4
    minimum = min(values)
    at_minimum = [k for k, value in enumerate(values) if value <= minimum + 1e-12]
    assert {int(n * rho), int(n * rho) + 1} & set(at_minimum)


@pytest.mark.parametrize("t", [-0.5, 1.2])
def test_no_vertex_or_inner_point_is_below_theorem_3_2(t):
    n, upper = 6, 1.0
    lowest = min(polarization([upper] * k + [0.0] * (n - k), t) for k in range(n + 1))
    for vertex in itertools.product([0.0, upper], repeat=n):
        assert polarization(list(vertex), t) >= lowest - 1e-12


unit_interval = st.lists(
    st.integers(0, 64).map(lambda i: i / 64), min_size=4, max_size=4
)  # sums of these are exact


@settings(max_examples=50, deadline=None, derandomize=True)
@given(x=unit_interval, y=unit_interval, t=st.floats(-2, 2))
def test_concave_on_the_box(x, y, t):
    middle = [(a + b) / 2 for a, b in zip(x, y, strict=True)]
    mean_of_ends = (polarization(x, t) + polarization(y, t)) / 2
    assert polarization(middle, t) >= mean_of_ends - 1e-12


@settings(max_examples=50, deadline=None, derandomize=True)
@given(x=st.permutations([i / 64 for i in (0, 0, 3, 17, 17, 40, 64)]), t=st.floats(-2, 2))
def test_permutations_permute_the_subgradient(x, t):
    def subgradient_of(values):
        gamma, grad = torch.tensor(values), torch.zeros(len(values))
        polarize.add_subgradient_([gamma], [grad], [], POLARIZATION, 1.0, t)
        return grad.tolist()

    pairs = dict(zip(sorted(x), subgradient_of(sorted(x)), strict=True))
    assert subgradient_of(x) == [pairs[value] for value in x]


# --- (b) clamp ---------------------------------------------------------------------------------


@both_backends
def test_clamp(backend):
    device = device_of(backend)
    values = [-1.0, -0.0, 0.0, 0.3, 0.8, 0.9, float("nan"), float("inf"), -float("inf")]
    param = torch.nn.Parameter(torch.tensor(values, device=device))
    frozen = torch.nn.Parameter(torch.tensor([-1.0, 2.0], device=device), requires_grad=False)
    param.grad = torch.zeros_like(param)
    table = table_of([param, frozen], backend)
    table.clamp_(0.8, torch.tensor(1.0, device=device))
    assert param[0] == -1 and param[5] > 0.8  # found_inf: nothing moves
    table.clamp_(0.8, torch.tensor(0.0, device=device))
    torch.testing.assert_close(
        param.detach(), torch.tensor(values, device=device).clamp(0, 0.8), equal_nan=True
    )
    assert frozen.tolist() == [-1.0, 2.0]


# --- (c) fused SGD -----------------------------------------------------------------------------

OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"momentum": 0.5, "dampening": 0.3, "weight_decay": 1e-2, "maximize": True},
    {"weight_decay": 0.1, "maximize": True},
]


def run_fused_steps(table, params, plain, grads_of, steps, reg, lr, upper, options, scale=None):
    """The fused step beside torch.optim.SGD on the same gradients, buffers where SGD keeps them."""
    state = {param: {} for param in params}
    for step in range(steps):
        grads = grads_of(step)
        plain.step(grads)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * (1.0 if scale is None else scale)
            if options.get("momentum") and step == 0:
                state[param]["momentum_buffer"] = torch.full_like(param, float("nan"))
        table.refresh(state)
        table.sgd_step_(*reg, lr=lr, upper=upper, first_step=step == 0, grad_scale=scale, **options)
    return [entry.get("momentum_buffer") for entry in state.values()]


@both_backends
@all_regularizers
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_100_steps_of_sgd(backend, kind, per_layer, options):
    steps = 100 if backend == "cpu" else 5
    device = device_of(backend)
    params = random_gammas(SIZES, torch.float64, device)
    frozen = torch.nn.Parameter(torch.rand(7, dtype=torch.float64, device=device), False)
    lr, lam, t = 0.05, 0.02, 1.2
    upper = 1.0 if kind == POLARIZATION else None
    weights = [*WEIGHTS, 3.0]
    plain = PlainTraining(
        params, [frozen], weights, kind, lam, t, per_layer, upper, lr=lr, **options
    )
    generator = torch.Generator().manual_seed(1)

    def grads_of(_step):
        return [torch.randn(p.shape, generator=generator).to(p) / 10 for p in params]

    scale = torch.tensor(1024.0, device=device)
    table = table_of([*params, frozen], backend, weights)
    reg = (kind, lam, t, per_layer)
    momenta = run_fused_steps(table, params, plain, grads_of, steps, reg, lr, upper, options, scale)
    for got, want in zip(params, plain.gammas, strict=True):
        torch.testing.assert_close(got.cpu().detach(), want.detach(), rtol=1e-9, atol=1e-9)
    if options.get("momentum"):
        for got, want in zip(momenta, plain.momenta(), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_step_of_sgd_in_lower_precision(dtype):
    params = random_gammas(SIZES, dtype)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    reg = (POLARIZATION, 0.02, 1.2, False)
    plain = PlainTraining(params, [], WEIGHTS, *reg, 1.0, lr=0.05, **options)
    grads = [param.grad.clone() for param in params]
    table = table_of(params, "cpu", WEIGHTS)
    run_fused_steps(table, params, plain, lambda _: grads, 1, reg, 0.05, 1.0, options)
    assert_close(params, plain.gammas, dtype)


@both_backends
def test_nothing_moves_when_a_gradient_was_infinite(backend):
    params = random_gammas(SIZES, device=device_of(backend))
    state = {param: {"momentum_buffer": torch.ones_like(param)} for param in params}
    before = [bits(param) for param in params]
    table = table_of(params, backend)
    table.refresh(state)
    found_inf = torch.ones(1, device=device_of(backend))
    table.sgd_step_(POLARIZATION, 0.1, 1.2, False, lr=0.1, momentum=0.9, found_inf=found_inf)
    assert [bits(param) for param in params] == before
    assert all((entry["momentum_buffer"] == 1).all() for entry in state.values())
