"""Subgradient, clamp and fused SGD step, on every backend, against autograd and torch.optim.SGD."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from backends import BACKENDS, TOLERANCE, bits, device_of, random_gammas, table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DEEPHOYER, L1, POLARIZATION, REGULARIZERS, PlainTraining, subgradients

from polarfast.kernels import polarize
from polarfast.kernels.polarize_ref import add_subgradient_ref, clamp_ref, sgd_step_ref
from polarfast.kernels.table import ScaleTable

SIZES = [3, 64, 130, 1]
WEIGHTS = [1.0, 0.5, 2.0, 1.25]
FROZEN = 2

both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_regularizers = pytest.mark.parametrize(("kind", "per_layer"), REGULARIZERS)


def assert_close(got, want, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.detach().double().cpu(), b.detach().double().cpu(), rtol=tolerance, atol=tolerance
        )


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


# --- the same bits everywhere ------------------------------------------------------------------


def three_steps() -> list[bytes]:
    params = random_gammas([1, 17, 300, 5000])
    state = {param: {"momentum_buffer": torch.zeros_like(param)} for param in params}
    table = ScaleTable([str(i) for i in range(len(params))], params)
    for kind, per_layer in REGULARIZERS:
        table.refresh(state)
        table.add_subgradient_(kind, 0.1, 1.2, per_layer)
        table.sgd_step_(kind, 0.1, 1.2, per_layer, lr=0.1, momentum=0.9, upper=1.0)
    return [bits(tensor) for param in params for tensor in (param, param.grad)]


def test_same_bits_for_any_thread_count():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(three_steps())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_same_bits_for_any_instruction_set():
    code = (
        "import hashlib, test_polarize; from polarfast import _C; "
        "found = b''.join(test_polarize.three_steps()); "
        "print(_C.build_info()['simd'], hashlib.sha256(found).hexdigest())"
    )
    found = {}
    for level in ("baseline", "avx2", "best"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "POLARFAST_SIMD": level},
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            check=True,
        )
        name, digest = done.stdout.split()
        found[name] = digest
    assert "baseline" in found
    assert len(set(found.values())) == 1, found


# --- ops on lists ------------------------------------------------------------------------------


def op_arguments():
    gammas, grads, momenta = ([torch.rand(5), torch.rand(7)] for _ in range(3))
    frozen = [torch.rand(3)]
    penalty = ([1.0, 2.0, 0.5], POLARIZATION, 0.1, 1.2, False)
    scalars = (torch.tensor(8.0), torch.tensor(0.0))
    sgd = (0.1, 0.9, 0.1, 1e-2, False, False, 1.0, False)
    return {
        "add_subgradient_": ([*gammas, *frozen], grads, *penalty, scalars[0]),
        "clamp_": (gammas, 0.5, scalars[1]),
        "sgd_step_": (gammas, grads, momenta, frozen, *penalty, *sgd, *scalars),
    }


REFERENCES = {
    "add_subgradient_": add_subgradient_ref,
    "clamp_": clamp_ref,
    "sgd_step_": sgd_step_ref,
}


def copied(arguments):
    return [
        [x.clone() if isinstance(x, torch.Tensor) else x for x in argument]
        if isinstance(argument, list)
        else argument
        for argument in arguments
    ]


@pytest.mark.parametrize("name", REFERENCES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.polarfast, name).default, op_arguments()[name])


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_and_op_agree(name):
    arguments = op_arguments()[name]
    by_op, by_reference = copied(arguments), copied(arguments)
    getattr(torch.ops.polarfast, name)(*by_op)
    REFERENCES[name](*by_reference)
    for got, want in zip(by_op, by_reference, strict=True):
        if isinstance(got, list) and isinstance(got[0], torch.Tensor):
            assert_close(got, want)


@pytest.mark.parametrize("name", REFERENCES)
def test_compiles_without_a_graph_break(name):
    op = getattr(torch.ops.polarfast, name)

    def step(*arguments):
        op(*arguments)
        return arguments[0][0] + 1, arguments[1]

    eager = copied(op_arguments()[name])
    compiled = copied(eager)
    want = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_ops_bump_version_counters():
    arguments = op_arguments()
    written = {"add_subgradient_": [1], "clamp_": [0], "sgd_step_": [0, 2]}
    for name, positions in written.items():
        tensors = [x for x in arguments[name] if isinstance(x, list) for x in x]
        tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        expected = {id(x) for position in positions for x in arguments[name][position]}
        before = [x._version for x in tensors]
        getattr(torch.ops.polarfast, name)(*arguments[name])
        for x, version in zip(tensors, before, strict=True):
            assert (x._version > version) == (id(x) in expected), name


def test_wrappers_pass_every_option_on():
    """The named arguments of the wrapper, in an order of their own, do what the op does."""
    gammas, grads, momenta, frozen, *penalty = copied(op_arguments()["sgd_step_"])[:9]
    names = "lr momentum dampening weight_decay nesterov maximize upper first_step"
    names = [*names.split(), "grad_scale", "found_inf"]
    values = op_arguments()["sgd_step_"][9:]
    by_op = copied([gammas, grads, momenta, frozen])
    torch.ops.polarfast.sgd_step_(*by_op, *penalty, *values)
    shuffled = dict(reversed(list(zip(names, values, strict=True))))
    polarize.sgd_step_(gammas, grads, momenta, frozen, *penalty, **shuffled)
    torch.testing.assert_close([gammas, momenta], [by_op[0], by_op[2]], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[1].__setitem__(0, torch.rand(10)[::2]), "grads.0. is not contiguous"),
        (lambda a: a[1].__setitem__(1, torch.rand(6)), "grads.1. has another size"),
        (lambda a: a[1].__setitem__(0, torch.rand(5).double()), "grads.0. is of another dtype"),
        (lambda a: a[1].extend([torch.rand(5)] * 3), "more grads than scaling factors"),
        (lambda a: a[2].append(1.0), "one weight for each"),
        (lambda a: a.__setitem__(3, 7), "no regularizer has the kind 7"),
        (lambda a: a[0].clear(), "no scaling factors"),
    ],
)
def test_op_refuses(change, message):
    arguments = list(op_arguments()["add_subgradient_"])
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.polarfast.add_subgradient_(*arguments)


def test_l1_needs_no_mean():
    """An infinite γ stays the only one: L1's subgradient is a sign, and sums nothing."""
    gamma, grad = torch.tensor([float("inf"), -1.0, 0.0]), torch.zeros(3)
    polarize.add_subgradient_([gamma], [grad], [], L1, 0.5, 0.0)
    assert grad.tolist() == [0.5, -0.5, 0.0]
