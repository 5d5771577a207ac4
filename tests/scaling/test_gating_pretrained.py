"""How a trained network starts: gates leave what it has learned, other ways in warn."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.examples import example
from support.gating import X
from support.nets import Residual, chain, settle
from torch import nn

import polarfast as pf


def learned() -> nn.Module:
    """γ of any size, some of them negative."""
    model = settle(Residual(), X).float().train()
    with torch.no_grad():
        model.first[1].weight[:2] = torch.tensor([-0.4, 1.7])
    return model


def one_step(model: nn.Module, scales: pf.ScalingFactors) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    F.cross_entropy(model(X.float()), torch.tensor([0, 1, 2])).backward()
    pf.step(optimizer, scales, pf.Polarization(lam=1e-3, t=1.2, clamp="all"))


def test_first_values_do_not_overwrite_learned_factors_in_silence():
    model = learned()
    scales = pf.scaling_factors(model, X.float())
    scales["second.1.weight"].data.fill_(0.7)  # of a layer that hasn't learned
    with pytest.warns(UserWarning, match=r"1 of 2 layers .* 0.5: first.1.weight\. .*add_gates"):
        pf.init_scales(scales, 0.5)
    assert all(bool((gamma == 0.5).all()) for gamma in scales.values())


@pytest.mark.parametrize("first", [None, 0.5, 0.0])
def test_a_fresh_network_starts_without_a_warning(first):
    model = Residual()
    scales = pf.scaling_factors(model, X.float(), residual="expand")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in [1.0] if first is None else [first, 1.0]:  # twice is no harm either
            pf.init_scales(scales, value)
        one_step(model, scales)


def test_gates_leave_learned_factors_alone_without_a_warning():
    model = learned()
    before = copy.deepcopy(model)
    scales = pf.add_gates(model, X.float(), residual="expand")
    with torch.no_grad():
        assert torch.equal(model.eval()(X.float()), before.eval()(X.float()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model.train(), scales)
        pf.init_scales(scales, 1.0)  # from the start again
    assert model.first[1].weight[0] < -0.3 and model.first[1].weight[1] > 1.6


def test_the_clamp_of_learned_factors_points_at_gates():
    model = learned()
    with pytest.warns(UserWarning, match=r"2 values in 1 of .*first.1.weight \(2\).*pf.add_gates"):
        one_step(model, pf.scaling_factors(model, X.float()))


def test_gates_lost_by_a_conversion_are_noticed():
    def converted() -> tuple[nn.Module, pf.ScalingFactors, torch.optim.Optimizer, nn.Module]:
        model = chain()
        scales = pf.add_gates(model, X.float(), ".")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        whole = copy.deepcopy(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model).eval(), scales, optimizer, whole

    model, scales, optimizer, whole = converted()
    assert list(scales) == ["1.gate", "4.gate", "6.gate"]  # the last, of a convolution, is kept
    model(X.float()).sum().backward()
    states = copy.deepcopy(model.state_dict())
    for use in (
        lambda: pf.step(optimizer, scales, pf.Polarization(lam=0.1, t=1.2)),
        lambda: pf.plan(model, X.float(), scales),
        lambda: scales.rebind(model),
        lambda: pf.slim(
            model, pf.plan(whole, X.float(), pf.scaling_factors(whole, X.float()))
        ),
    ):  # fmt: skip
        with pytest.raises(pf.PolarfastError, match="gate.*convert first, then add gates"):
            use()
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert all(bool((gate == 1).all()) for gate in scales.values())
    twin = copy.deepcopy(scales)  # of no network
    for gate in twin.values():
        gate.grad = torch.zeros_like(gate)
    pf.step(torch.optim.SGD(twin.values(), lr=0.1), twin, pf.Polarization(lam=0.1, t=1.2))


def test_parameters_replaced_after_the_first_step_are_noticed_with_the_next_optimizer():
    model = Residual()
    scales = pf.scaling_factors(model, X.float())
    one_step(model, scales)
    replaced = copy.deepcopy(model.state_dict())
    model.load_state_dict(replaced, assign=True)
    old = torch.optim.SGD([*scales.values()], lr=0.1)
    with pytest.raises(pf.PolarfastError, match=r"2 of 2 .* no parameters of the network .*rebind"):
        pf.step(old, scales, pf.Polarization(lam=0.1, t=1.2))
    one_step(model, scales.rebind(model))


@pytest.mark.slow
def test_a_trained_network_is_gated_polarized_pruned_and_fine_tuned(capsys):
    pytest.importorskip("sklearn")
    found = example("pretrained_start").main()
    assert found["pretrained"] > 95
    assert found["pruned"] > found["pretrained"] - 2 and found["MACs cut"] > 30
    assert abs(found["pruned"] - found["polarized"]) < 0.5
    assert found["fine-tuned"] > found["pretrained"] - 1
    assert ".gate" in capsys.readouterr().out
