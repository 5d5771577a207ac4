"""Subgradient, clamp and fused SGD step, on every backend, against autograd and torch.optim.SGD."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import (
    BACKENDS,
    TOLERANCE,
    WITH_ALL_LAUNCHES,
    assert_close,
    bits,
    device_of,
    random_gammas,
    table_of,
)
from support.oracles import (
    CENTERED,
    DEEPHOYER,
    L1,
    POLARIZATION,
    REGULARIZERS,
    VARIANTS,
    PlainTraining,
    subgradients,
    variant,
)

from polarfast.errors import ArgumentError
from polarfast.kernels.table import Penalty, SgdStep

SIZES = [3, 64, 700, 1]  # one longer than a Triton block, one of a single γ
WEIGHTS = [1.0, 0.5, 2.0, 1.25]
FROZEN = 1

ROWS_WITH_TIES = st.lists(
    st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_launch = pytest.mark.parametrize("backend", WITH_ALL_LAUNCHES)
every_case = pytest.mark.parametrize(
    ("backend", "kind", "per_layer"),
    [
        pytest.param(*backend.values, kind, per_layer, marks=backend.marks)
        for kind, per_layer in REGULARIZERS
        for backend in (BACKENDS if kind != POLARIZATION or per_layer else WITH_ALL_LAUNCHES)
    ],
)


def with_zero_gradients(rows, backend):
    params = [torch.nn.Parameter(torch.tensor(row, device=device_of(backend))) for row in rows]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


# --- (a) subgradient ---------------------------------------------------------------------------


@every_case
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
    table.add_subgradient_(Penalty(kind, lam, t, per_layer), grad_scale)
    assert_close([param.grad for param in params], want, dtype)


@every_launch
@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_variants_of_eq_2_are_those_of_autograd(backend, form, dtype):
    """And one t for each layer; a step of SGD takes them too."""
    params = random_gammas(SIZES, dtype, device_of(backend))
    penalty, tilts = VARIANTS[form], [0.0, -0.4, 0.3, 0.1]
    leaves = [param.detach().double().cpu().requires_grad_() for param in params]
    added = torch.autograd.grad(variant(leaves, WEIGHTS, penalty, tilts), leaves)
    grads = [param.grad.double().cpu() for param in params]
    want = [grad + extra for grad, extra in zip(grads, added, strict=True)]
    moved = [leaf.detach() - 0.5 * each for leaf, each in zip(leaves, want, strict=True)]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for twin, param in zip(twins, params, strict=True):
        twin.grad = param.grad.clone()
    table_of(params, backend, WEIGHTS, tilts).add_subgradient_(penalty)
    assert_close([param.grad for param in params], want, dtype)
    table_of(twins, backend, WEIGHTS, tilts).sgd_step_(penalty, SgdStep(lr=0.5))
    assert_close(twins, moved, dtype)


@every_launch
@pytest.mark.parametrize("form", ["weighted", "squared, weighted"])
def test_a_weighted_mean_of_nothing(backend, form):
    """All weights are 0: nothing is penalized, and nothing is NaN."""
    params = with_zero_gradients([[0.1, 0.9], [0.5]], backend)
    table_of(params, backend, [0.0, 0.0]).add_subgradient_(VARIANTS[form])
    assert not any(param.grad.any() for param in params)


@pytest.mark.slow
@every_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=ROWS_WITH_TIES,
    t=st.floats(-2, 2),
    per_layer=st.booleans(),
)
def test_subgradient_with_ties(backend, rows, t, per_layer):
    """γ that equal the mean, that are 0, that are all the same: sgn(0) = 0."""
    params = with_zero_gradients(rows, backend)
    weights = [1.0 + i for i in range(len(rows))]
    want = subgradients(params, weights, POLARIZATION, t, per_layer)
    table_of(params, backend, weights).add_subgradient_(Penalty(POLARIZATION, 1.0, t, per_layer))
    assert_close([param.grad for param in params], want)


@pytest.mark.slow
@every_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=ROWS_WITH_TIES,
    t=st.floats(-2, 2),
)
def test_subgradient_about_centers_with_ties(backend, rows, t):
    params = with_zero_gradients(rows, backend)
    weights = [1.0 + i for i in range(len(rows))]
    want = subgradients(params, weights, CENTERED, t)
    table_of(params, backend, weights).add_subgradient_(Penalty(CENTERED, 1.0, t))
    assert_close([param.grad for param in params], want)


@every_backend
def test_centers_change_between_steps(backend):
    """Above its center a factor of t = 1 feels nothing, under it 2λ, at 0 λ."""
    params = with_zero_gradients([[0.0, 0.4, 0.8], [0.4, 0.8]], backend)
    table = table_of(params, backend)
    for centers, want in (
        ((0.5, 0.5), [[1.0, 2.0, 0.0], [2.0, 0.0]]),
        ((0.3, 0.9), [[1.0, 0.0, 0.0], [2.0, 2.0]]),
    ):
        table.centers = centers
        for param in params:
            param.grad.zero_()
        table.add_subgradient_(Penalty(CENTERED, 1.0, 1.0))
        assert_close([param.grad for param in params], [torch.tensor(row) for row in want])


@every_backend
def test_centers_are_as_many_as_layers(backend):
    table = table_of(with_zero_gradients([[0.5], [0.5]], backend), backend)
    with pytest.raises(ArgumentError, match="1 centers for 2"):
        table.centers = (0.5,)


@every_launch
def test_comparison_with_the_mean_is_in_double(backend):
    """The mean lies between two float32 neighbours: rounded to float32 it would equal one of them
    and that γ would count as 0."""
    low = torch.tensor(0.5)
    high = torch.nextafter(low, torch.tensor(1.0))
    params = with_zero_gradients([[float(low), float(low), float(high)]], backend)
    table_of(params, backend).add_subgradient_(Penalty(POLARIZATION, 1.0, 0.0))
    assert_close([params[0].grad], [torch.tensor([2 / 3, 2 / 3, -4 / 3])])


@every_launch
def test_equal_factors_feel_only_the_l1_term(backend):
    """γ_i = 0.3 everywhere: the float64 mean is 0.3 to the last bit, and sgn(0) = 0."""
    params = with_zero_gradients([[0.3] * size for size in SIZES], backend)
    table_of(params, backend).add_subgradient_(Penalty(POLARIZATION, 0.5, 1.5))
    assert all(torch.equal(p.grad, torch.full_like(p.grad, 0.75)) for p in params)


@every_launch
def test_frozen_factors_count_and_stay(backend):
    params = random_gammas(SIZES, device=device_of(backend))
    for param in params:
        param.grad.zero_()
    params[1].requires_grad_(False)
    params[3].grad = None
    before = [param.detach().clone() for param in params]
    want = subgradients(params, WEIGHTS, POLARIZATION, 1.2)
    penalty = Penalty(POLARIZATION, 1.0, 1.2)
    table = table_of(params, backend, WEIGHTS)
    table.add_subgradient_(penalty)
    assert_close([params[0].grad, params[2].grad], [want[0], want[2]])
    table.sgd_step_(penalty, SgdStep(lr=0.1, upper=0.1))
    table.clamp_(0.1)
    assert torch.equal(params[1], before[1]) and torch.equal(params[3], before[3])
    assert not params[1].grad.any() and params[3].grad is None
    assert not torch.equal(params[2], before[2])


@every_launch
def test_grad_scale_multiplies_the_subgradient(backend):
    plain, scaled = (random_gammas(SIZES, device=device_of(backend)) for _ in range(2))
    scale = torch.tensor(1024.0, device=device_of(backend))
    for params, by in ((plain, None), (scaled, scale)):
        for param in params:
            param.grad.zero_()
        table_of(params, backend).add_subgradient_(Penalty(POLARIZATION, 1e-4, 1.2), by)
    assert all(torch.equal(s.grad, 1024 * p.grad) for p, s in zip(plain, scaled, strict=True))


@every_backend
@pytest.mark.filterwarnings("ignore:invalid value")  # of inf / inf, in Triton's interpreter
def test_deephoyer_of_a_layer_of_zeros_is_zero(backend):
    """Whatever there is in another layer."""
    params = with_zero_gradients([[0.0] * 5, [float("inf"), 1.0, 1.0]], backend)
    table_of(params, backend).add_subgradient_(Penalty(DEEPHOYER, 1.0))
    assert torch.equal(params[0].grad, torch.zeros_like(params[0]))


@every_backend
def test_an_infinite_factor_stays_the_only_one_under_l1(backend):
    """A term that L1 does not have must not be computed as 0 · inf."""
    params = with_zero_gradients([[float("inf"), -1.0, 0.0]], backend)
    table_of(params, backend).add_subgradient_(Penalty(L1, 0.5))
    assert params[0].grad.tolist() == [0.5, -0.5, 0.0]


@every_launch
def test_same_bits_every_time(backend):
    results = []
    for _ in range(2):
        params = random_gammas(SIZES, device=device_of(backend))
        table = table_of(params, backend, WEIGHTS)
        table.add_subgradient_(Penalty(POLARIZATION, 0.1, 1.2))
        table.sgd_step_(Penalty(POLARIZATION, 0.1, 1.2), SgdStep(lr=0.1))
        results.append([bits(x) for param in params for x in (param, param.grad)])
    assert results[0] == results[1]


# --- properties of R_s, through R_s(γ) = γ · ∂R_s(γ): it is positively homogeneous of degree 1 ----


def subgradient_of(values, t, dtype=torch.float32):
    param = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
    param.grad = torch.zeros_like(param)
    table_of([param], "cpu").add_subgradient_(Penalty(POLARIZATION, 1.0, t))
    return param.grad


def polarization(values, t):
    return float(torch.tensor(values).double() @ subgradient_of(values, t, torch.float64))


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
    pairs = dict(zip(sorted(x), subgradient_of(sorted(x), t).tolist(), strict=True))
    assert subgradient_of(x, t).tolist() == [pairs[value] for value in x]


# --- (b) clamp ---------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_clamp_is_that_of_torch(backend, dtype):
    device = device_of(backend)
    values = [-1.0, -0.0, 0.0, 0.3, 0.8, 0.9, float("nan"), float("inf"), -float("inf")]
    param = torch.nn.Parameter(torch.tensor(values, dtype=dtype, device=device))
    frozen = torch.nn.Parameter(torch.tensor([-1.0, 2.0], dtype=dtype, device=device), False)
    param.grad = torch.zeros_like(param)
    table, before = table_of([param, frozen], backend), bits(param)
    table.clamp_(0.75, torch.tensor(1.0, device=device))
    assert bits(param) == before  # found_inf: nothing moves
    want = param.detach().clamp(0, 0.75)
    table.clamp_(0.75, torch.tensor(0.0, device=device))
    torch.testing.assert_close(param.detach(), want, rtol=0, atol=0, equal_nan=True)
    assert frozen.tolist() == [-1.0, 2.0]


# --- (c) fused SGD -----------------------------------------------------------------------------

OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"momentum": 0.5, "dampening": 0.3, "weight_decay": 1e-2, "maximize": True},
    {"weight_decay": 0.1, "maximize": True},
]


def run_fused_steps(table, params, plain, grads_of, steps, penalty, sgd, scale=None):
    """The fused step beside torch.optim.SGD on the same gradients, buffers where SGD keeps them."""
    state = {param: {} for param in params}
    for step in range(steps):
        grads = grads_of(step)
        plain.step(grads)
        given = [grad * (1.0 if scale is None else scale) for grad in grads]
        for param, grad in zip(params, given, strict=True):
            param.grad = grad.clone()
            if sgd.momentum and step == 0:
                state[param]["momentum_buffer"] = torch.full_like(param, float("nan"))
        table.refresh(state)
        table.sgd_step_(penalty, sgd._replace(first_step=step == 0), grad_scale=scale)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, given, strict=True))
    return [entry.get("momentum_buffer") for entry in state.values()]


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_100_steps_of_sgd(backend, kind, per_layer, options):
    steps = 3 if backend.startswith("triton") else 100
    device = device_of(backend)
    params = random_gammas(SIZES, torch.float64, device)
    frozen = torch.nn.Parameter(torch.rand(7, dtype=torch.float64, device=device), False)
    penalty = Penalty(kind, 0.02, 1.2, per_layer)
    sgd = SgdStep(lr=0.05, upper=1.0 if kind == POLARIZATION else None, **options)
    weights = [*WEIGHTS, 3.0]
    plain = PlainTraining(params, [frozen], weights, penalty, sgd)
    generator = torch.Generator().manual_seed(1)

    def grads_of(_step):
        return [torch.randn(p.shape, generator=generator).to(p) / 10 for p in params]

    scale = torch.tensor(1024.0, device=device)
    table = table_of([*params, frozen], backend, weights)
    momenta = run_fused_steps(table, params, plain, grads_of, steps, penalty, sgd, scale)
    for got, want in zip(params, plain.gammas, strict=True):
        torch.testing.assert_close(got.cpu().detach(), want.detach(), rtol=1e-9, atol=1e-9)
    if sgd.momentum:
        for got, want in zip(momenta, plain.momenta(), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_step_of_sgd_in_lower_precision(backend, dtype):
    params = random_gammas(SIZES, dtype, device_of(backend))
    penalty = Penalty(POLARIZATION, 0.02, 1.2)
    sgd = SgdStep(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, upper=1.0)
    plain = PlainTraining(params, [], WEIGHTS, penalty, sgd)
    grads = [param.grad.clone() for param in params]
    table = table_of(params, backend, WEIGHTS)
    run_fused_steps(table, params, plain, lambda _: grads, 1, penalty, sgd)
    assert_close(params, plain.gammas, dtype)


@every_launch
def test_a_power_of_two_as_scale_divides_exactly(backend):
    scale = torch.tensor(65536.0, device=device_of(backend))
    plain, scaled = (random_gammas(SIZES, device=device_of(backend)) for _ in range(2))
    for param in scaled:
        param.grad *= scale
    penalty, sgd = Penalty(POLARIZATION, 0.02, 1.2), SgdStep(lr=0.1)
    table_of(plain, backend).sgd_step_(penalty, sgd)
    found_inf = torch.zeros(1, device=device_of(backend))
    table_of(scaled, backend).sgd_step_(penalty, sgd, scale, found_inf)
    assert [bits(p) for p in plain] == [bits(p) for p in scaled]


@every_launch
def test_nothing_moves_when_a_gradient_was_infinite(backend):
    params = random_gammas(SIZES, device=device_of(backend))
    state = {param: {"momentum_buffer": torch.ones_like(param)} for param in params}
    before = [bits(param) for param in params]
    table = table_of(params, backend)
    table.refresh(state)
    found_inf = torch.ones(1, device=device_of(backend))
    sgd = SgdStep(lr=0.1, momentum=0.9, upper=0.1)
    table.sgd_step_(Penalty(POLARIZATION, 0.1, 1.2), sgd, found_inf=found_inf)
    assert [bits(param) for param in params] == before
    assert all((entry["momentum_buffer"] == 1).all() for entry in state.values())


@every_backend
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_infinite_numbers_are_no_more_than_sgd_makes_of_them(backend, momentum, nesterov):
    """What is switched off must not be computed as 0 · inf."""
    if nesterov and not momentum:
        return
    params = [torch.nn.Parameter(torch.tensor([0.5, 0.5, float("inf")], device=device_of(backend)))]
    params[0].grad = torch.tensor([float("inf"), -float("inf"), 1.0], device=device_of(backend))
    plain = torch.nn.Parameter(params[0].detach().clone())
    plain.grad = params[0].grad.clone()
    optimizers = [
        torch.optim.SGD([param], lr=0.1, momentum=momentum, nesterov=nesterov)
        for param in (params[0], plain)
    ]
    for optimizer in optimizers:
        optimizer.state[optimizer.param_groups[0]["params"][0]] = {
            "momentum_buffer": torch.ones_like(plain)
        }
    optimizers[1].step()
    table = table_of(params, backend)
    table.refresh(optimizers[0].state)
    table.sgd_step_(Penalty(L1, 0.0), SgdStep(0.1, momentum, nesterov=nesterov))
    assert torch.equal(params[0], plain)
