"""The dispatcher ops on lists: schema, reference, compilation, refusals."""

import pytest
import torch
from support.backends import assert_close
from support.oracles import L1, POLARIZATION

from polarfast.kernels import polarize
from polarfast.kernels.polarize_ref import add_subgradient_ref, clamp_ref, sgd_step_ref


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
