"""The pointer table: what it follows from step to step, and what it refuses."""

import sys
import weakref

import pytest
import torch
from support.backends import BACKENDS, bits, device_of, kind_of, random_gammas, table_of

import polarfast as pf
from polarfast.errors import ArgumentError, BuildError, ScalingFactorError
from polarfast.kernels import EagerTable, ScaleTable, table_type
from polarfast.kernels.table import Kind, Penalty, SgdStep

L1 = Penalty(Kind.L1, 0.5)


def l1_moves(table, params, expected):
    """Adds the L1 subgradient to zeroed gradients: shows whose gradient the table writes to."""
    for param in params:
        if param.grad is not None:
            param.grad.zero_()
    table.add_subgradient_(L1)
    for param, moved in zip(params, expected, strict=True):
        if param.grad is not None:
            want = 0.5 * param.detach().sign() if moved else torch.zeros_like(param)
            assert torch.equal(param.grad, want)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def params(backend):
    return random_gammas([4, 7, 2], device=device_of(backend))


def test_describes_its_factors(params, backend):
    table = table_of(params, backend)
    assert table.names == ("bn0.weight", "bn1.weight", "bn2.weight")
    assert table.params == tuple(params)
    assert table.numel == 13
    assert (table.dtype, table.device) == (torch.float32, params[0].device)


def test_follows_new_gradients(params, backend):
    """zero_grad(set_to_none=True), then a backward that makes new tensors."""
    table = table_of(params, backend)
    kept = [param.grad for param in params]  # so that the new ones lie elsewhere
    for param in params:
        param.grad = torch.empty_like(param)
    assert table.refresh() == 3
    l1_moves(table, params, [True] * 3)
    assert all(old is not param.grad for old, param in zip(kept, params, strict=True))


def test_follows_parameters_whose_data_is_replaced(params, backend):
    table = table_of(params, backend)
    params[1].data = -params[1].data.clone()
    table.refresh()
    l1_moves(table, params, [True] * 3)


def test_counts_gradients_and_leaves_frozen_factors_alone(params, backend):
    table = table_of(params, backend)
    assert table.refresh() == 3
    params[0].requires_grad_(False)
    assert table.refresh() == 2
    l1_moves(table, params, [False, True, True])
    params[1].grad = None
    assert table.refresh() == 1
    l1_moves(table, params, [False, False, True])
    before = params[0].detach().clone()
    table.clamp_(0.1)
    assert torch.equal(params[0], before)
    assert params[2].max() <= 0.1


def test_does_not_keep_old_gradients_alive(params, backend):
    table = table_of(params, backend)
    table.refresh()
    l1_moves(table, params, [True] * 3)
    old = weakref.ref(params[0].grad)
    params[0].grad = None
    assert old() is None


def test_finds_momentum_buffers_without_making_state(params, backend):
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    table = table_of(params, backend)
    table.refresh(optimizer.state)
    assert len(optimizer.state) == 0
    with pytest.raises(ScalingFactorError, match="bn0.weight has no momentum buffer"):
        table.sgd_step_(L1, SgdStep(lr=0.1, momentum=0.9))
    optimizer.step()
    buffers = [optimizer.state[param]["momentum_buffer"].clone() for param in params]
    table.refresh(optimizer.state)
    table.sgd_step_(L1, SgdStep(lr=0.0, momentum=0.5))
    for param, before in zip(params, buffers, strict=True):
        want = 0.5 * before + param.grad + 0.5 * param.detach().sign()
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], want)


def test_bumps_versions_of_what_it_wrote(params, backend):
    params[0].requires_grad_(False)
    table = table_of(params, backend)

    def versions():
        return [(param._version, param.grad._version) for param in params]

    def bumped(call):
        before = versions()
        call()
        return [(a > c, b > d) for (a, b), (c, d) in zip(versions(), before, strict=True)]

    grads_only, factors_only = (False, True), (True, False)
    frozen = (False, False)
    assert bumped(lambda: table.add_subgradient_(L1)) == [frozen, grads_only, grads_only]
    assert bumped(lambda: table.clamp_(1.0)) == [frozen, factors_only, factors_only]
    assert bumped(lambda: table.sgd_step_(L1, SgdStep(lr=0.1))) == [
        frozen,
        factors_only,
        factors_only,
    ]


def test_thresholds_leave_a_step_what_it_has_found(params, backend):
    """Whoever looks, from whatever thread, while the gradients are withheld from the optimizer."""
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    table = table_of(params, backend)
    table.refresh(optimizer.state)
    grads = [param.grad for param in params]
    before = [bits(param) for param in params]
    for param in params:
        param.grad = None
    table.valley()
    table.sgd_step_(L1, SgdStep(lr=0.1, momentum=0.9))
    assert all(bits(param) != was for param, was in zip(params, before, strict=True))
    assert len(grads) == len(params)  # alive until here


def test_thresholds_are_of_factors_where_they_are_now(params, backend):
    table = table_of(params, backend)
    params[1].data = torch.zeros_like(params[1])
    assert table.valley()[1][1].tolist() == [7, *[0] * 99]


def test_autograd_notices_a_clamp_between_forward_and_backward(params, backend):
    loss = params[0].square().sum()
    with torch.no_grad():
        table_of(params, backend).clamp_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def break_gradient(make):
    def change(params, state):
        params[1].grad = None
        params[1].grad = make(params[1].detach())

    return change


def break_buffer(make):
    def change(params, state):
        state[params[1]] = {"momentum_buffer": make(params[1].detach())}

    return change


def break_factor(make):
    def change(params, state):
        params[1].grad = None
        params[1].data = make(params[1].detach())

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_gradient(lambda x: x.to_sparse()), "gradient of bn1.weight is sparse"),
        (break_gradient(lambda x: x[:1].expand(7)), "gradient of bn1.weight is not contiguous"),
        (break_buffer(lambda x: x.double()), "buffer of bn1.weight is torch.float64"),
        (break_buffer(lambda x: x[:3].clone()), "buffer of bn1.weight has 3 elements; expected 7"),
        (break_gradient(torch._neg_view), "gradient of bn1.weight is negated when it is read"),
        (break_buffer(torch._neg_view), "buffer of bn1.weight is negated when it is read"),
        (break_factor(lambda x: x.double()), "bn1.weight is torch.float64"),
        (break_factor(lambda x: x[:3].clone()), "bn1.weight has 3 elements; expected 7"),
        (break_factor(lambda x: x.repeat(2)[::2]), "bn1.weight is not contiguous"),
    ],
)
def test_names_what_cannot_be_used(params, backend, change, message):
    table = table_of(params, backend)
    state = {}
    change(params, state)
    with pytest.raises(ScalingFactorError, match=message):
        table.refresh(state)


SUCCESSORS = {
    "smaller": lambda x: x.detach()[:3],
    "half as wide": lambda x: x.detach().view(torch.bfloat16)[:7],
    "negated": lambda x: torch._neg_view(x.detach()),
    "strided": lambda x: x.detach()[:1].expand(7),
}


@pytest.mark.parametrize("successor", SUCCESSORS)
@pytest.mark.parametrize("which", ["factor", "gradient", "buffer"])
def test_what_lies_at_the_same_address_is_looked_at_anew(params, backend, which, successor):
    """The allocator gives an address again, to a tensor of another size or kind."""
    make, optimizer = SUCCESSORS[successor], torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    state = dict(optimizer.state)
    table = table_of(params, backend)
    assert table.refresh(state) == 3
    kept = [param.detach() for param in params]  # alive, whatever is put in their place
    grads = [param.grad.detach() for param in params]
    buffers = [state[param]["momentum_buffer"] for param in params]
    before = [bits(x) for x in (*kept, *grads, *buffers)]
    if which == "factor":
        params[1].data = make(params[1])
    elif which == "gradient":
        params[1].grad.data = make(params[1].grad)
    else:
        state[params[1]] = {"momentum_buffer": make(state[params[1]]["momentum_buffer"])}
    if which == "factor":
        with pytest.raises(ScalingFactorError, match="^bn1.weight"):
            table.clamp_(0.1)
        if backend != "eager":  # it reads no addresses
            with pytest.raises(ScalingFactorError, match="^bn1.weight"):
                table.valley()
    with pytest.raises(ScalingFactorError, match="bn1.weight"):
        table.refresh(state)
    assert [bits(x) for x in (*kept, *grads, *buffers)] == before


def test_a_clamp_follows_factors_that_were_moved_since_the_gradients_were_read(params, backend):
    """As optimizers and hooks do that assign to param.data."""
    table = table_of(params, backend)
    before = params[1].detach()
    params[1].data = params[1].detach() + 1
    was = bits(before)
    table.clamp_(0.5)
    assert params[1].max() <= 0.5 and bits(before) == was


def factor(*shape, **options):
    return torch.nn.Parameter(torch.rand(*shape, **options))


def views(of):
    return [torch.nn.Parameter(part) for part in of(torch.rand(6))]


def test_factors_that_are_pieces_of_one_buffer_are_used():
    """As wrappers lay parameters one behind the other."""
    params = views(lambda x: (x[4:], x[:4]))
    assert ScaleTable(["a", "b"], params).numel == 6


@pytest.mark.parametrize(
    ("names", "factors", "weights", "message"),
    [
        ([], [], None, "no scaling factor"),
        (["a"], [factor(3), factor(3)], None, "1 names, 2 params"),
        (["a"], [factor(3)], [1.0, 2.0], "2 weights"),
        (["a"], [factor(3)], [float("nan")], "a: its layer weight is nan"),
        (["a", "b"], [factor(3), factor(3).double()], None, "b is torch.float64 on cpu, but a is"),
        (["a"], [torch.ones(3, dtype=torch.int32)], None, "a is torch.int32"),
        (["a"], [torch.rand(6)[::2]], None, "a is not contiguous"),
        (["a", "b"], [torch.rand(3)] * 2, None, "b is the same parameter as a"),
        (["a", "b"], views(lambda x: (x, x)), None, "'a' and 'b' have channels in the same memory"),
        (
            ["a", "b"],
            views(lambda x: (x[3:], x[:4])),
            None,
            "'b' and 'a' have channels in the same",
        ),
        (["a"], [torch.rand(3, device="meta")], None, "a"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_refuses_what_makes_no_table(backend, names, factors, weights, message):
    with pytest.raises((ArgumentError, ScalingFactorError), match=message):
        kind_of(backend)(names, factors, weights)


def test_refuses_a_regularizer_that_it_does_not_know():
    table = table_of(random_gammas([3]), "cpu")
    with pytest.raises(ValueError, match="no regularizer has the kind 7"):
        table.add_subgradient_(L1._replace(kind=7))


def test_the_device_chooses_the_table():
    assert table_type("cpu") is ScaleTable
    assert table_type("mps") is EagerTable


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_on_an_unknown_device_is_that_of_the_cpu(momentum, monkeypatch):
    found = []
    for kind in (ScaleTable, EagerTable):
        monkeypatch.setattr("polarfast.kernels.table_type", lambda device, kind=kind: kind)
        params = random_gammas([4, 7, 2])
        scales = pf.ScalingFactors({f"{i}.weight": param for i, param in enumerate(params)})
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=momentum)
        for _ in range(3):
            pf.step(optimizer, scales, pf.Polarization(lam=0.1, t=1.2))
        found.append([param.detach() for param in params])
    torch.testing.assert_close(found[1], found[0])


def test_without_triton_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "polarfast.kernels.triton_table", raising=False)
    monkeypatch.delitem(sys.modules, "polarfast.kernels.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BuildError, match="pip install triton"):
        table_type("cuda")
    assert table_type("xpu") is EagerTable
