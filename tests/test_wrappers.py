"""What holds a network instead of being one: it is looked through, or an error says what to give
instead. Never a wrong result, nor torch's own error.
"""

import copy
import re

import pytest
import torch
from support.nets import X, chain, prepared
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import polarfast as pf


class Holder(nn.Module):
    """A wrapper that nobody knows: what it holds is its `module`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network

    def forward(self, x):
        return self.module(x)


class Silent(nn.Module):
    """As a LightningModule without a forward of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network


class Average:
    """As timm's first ModelEma: no module itself."""

    def __init__(self, network: nn.Module) -> None:
        self.ema = network


def ema(version: str):
    return lambda network: getattr(pytest.importorskip("timm.utils"), version)(network)


def lightning(network: nn.Module) -> nn.Module:
    module = pytest.importorskip("lightning").LightningModule()
    module.net = network
    return module


LOOKED_THROUGH = {
    "AveragedModel": AveragedModel,
    "DataParallel": nn.DataParallel,
    "compile": lambda network: torch.compile(network, backend="eager"),
    "compiled average": lambda network: AveragedModel(torch.compile(network, backend="eager")),
}
#: Wrapper -> where the network is in it.
HOLDS = {
    "unknown": (Holder, "module"),
    "twice": (lambda network: Holder(Holder(network)), "module.module"),
    "around DataParallel": (lambda network: Holder(nn.DataParallel(network)), "module.module"),
    "in DataParallel": (lambda network: nn.DataParallel(Holder(network)), "module"),
    "ModelEmaV2": (ema("ModelEmaV2"), "module"),
    "ModelEmaV3": (ema("ModelEmaV3"), "module"),
}
NO_NETWORK = {
    "no forward": (Silent, "no forward.* that it holds, .net$"),
    "Lightning": (lightning, "no forward.* that it holds, .net$"),
    "no module": (Average, "of type Average.* that it holds, .ema$"),
    "ModelEma": (ema("ModelEma"), "of type ModelEma.* that it holds, .ema$"),
    "list of networks": (lambda network: nn.ModuleList([network]), "ModuleList has no forward"),
    "class": (type, "the class Sequential, no nn.Module"),
    "state dict": (lambda network: network.state_dict(), "of type OrderedDict, no nn.Module"),
}
#: Those that need a library which takes seconds to import.
IMPORTS = {"Lightning", "ModelEma", "ModelEmaV2", "ModelEmaV3"}


def uses(model, plan, slim, scales, path):
    """Every call that is given a network."""

    def load():
        pf.save(slim[1], plan, path)
        return pf.load(path, lambda: model)

    return {
        "slim": lambda: pf.slim(model, plan),
        "slim, plan from a file": lambda: pf.slim(model, pf.PruningPlan.from_json(plan.to_json())),
        "verify": lambda: pf.verify(model, slim[1], plan, X),
        "rebind": lambda: scales.rebind(model),
        "plan": lambda: pf.plan(model, X, scales),
        "reachable": lambda: pf.reachable(model, X, scales),
        "FlopsTarget": lambda: pf.FlopsTarget(model, X, scales, cut=0.3, steps=100),
        "CutPredictor": lambda: pf.CutPredictor(model, X, scales),
        "mac_weights": lambda: pf.mac_weights(model, X, scales),
        "shrink": lambda: pf.shrink(model, torch.optim.SGD(slim[0].parameters(), lr=0.1), plan),
        "profile": lambda: plan.profile(model, seconds=0.01),
        "load": load,
    }


def network():
    model, scales = prepared(chain)
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    assert plan.macs < plan.macs_before
    return model, scales, plan


def computes(model):
    with torch.no_grad():
        return model(X.clone())


@pytest.mark.parametrize("name", LOOKED_THROUGH)
def test_what_is_looked_through_gives_the_slim_network(name, tmp_path):
    model, scales, plan = network()
    wrapped = LOOKED_THROUGH[name](model)
    slim = pf.slim(model, plan)
    wanted = computes(model)
    assert list(pf.scaling_factors(wrapped, X)) == list(scales)
    for found in (
        pf.slim(wrapped, plan),
        pf.slim(model, pf.plan(wrapped, X, scales.rebind(wrapped), "fixed", value=0.0)),
    ):
        assert type(found) is type(model)
        assert [p.shape for p in found.parameters()] == [p.shape for p in slim.parameters()]
        torch.testing.assert_close(computes(found), wanted)
    pf.save(LOOKED_THROUGH[name](slim), plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", lambda: LOOKED_THROUGH[name](prepared(chain)[0]))
    torch.testing.assert_close(computes(loaded), wanted)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in IMPORTS else name for name in HOLDS],
)
def test_a_network_inside_is_named(name, tmp_path):
    model, scales, plan = network()
    make, path = HOLDS[name]
    wrapped, slim = make(copy.deepcopy(model)), pf.slim(model, plan)
    says = rf"give that, the network itself \(model\.{re.escape(path)}\)"
    for what, use in uses(wrapped, plan, (model, slim), scales, tmp_path / "slim.pt").items():
        with pytest.raises(pf.PolarfastError, match=says):
            pytest.fail(f"{what} gave {use()}")
    with pytest.raises(pf.FileFormatError, match=rf"save that \(model\.{re.escape(path)}\)"):
        pf.save(make(slim), plan, tmp_path / "other.pt")
    assert pf.verify(model, make(slim), plan, X).exact


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in IMPORTS else name for name in HOLDS],
)
def test_what_was_made_with_a_wrapper_is_not_taken_for_the_network_s(name, tmp_path):
    model, _, _ = network()
    make, path = HOLDS[name]
    wrapped = make(model)
    scales = pf.scaling_factors(wrapped, X)
    assert all(each.startswith(f"{path}.") for each in scales)
    plan = pf.plan(wrapped, X, scales, "fixed", value=0.0)
    slim = pf.slim(wrapped, plan)  # the wrapper is a network like any other
    torch.testing.assert_close(computes(slim), computes(wrapped))
    says = rf"without '{re.escape(path)}\.' .* Give the network itself there too"
    plain = copy.deepcopy(model)
    for what, use in uses(plain, plan, (wrapped, slim), scales, tmp_path / "slim.pt").items():
        with pytest.raises(pf.PolarfastError, match=says):
            pytest.fail(f"{what} gave {use()}")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in IMPORTS else name
        for name in NO_NETWORK
    ],
)
def test_what_is_no_network_is_refused(name, tmp_path):
    model, scales, plan = network()
    make, says = NO_NETWORK[name]
    given, slim = make(model), pf.slim(model, plan)
    calls = uses(given, plan, (model, slim), scales, tmp_path / "slim.pt")
    calls["scaling_factors"] = lambda: pf.scaling_factors(given, X)
    calls["add_gates"] = lambda: pf.add_gates(given, X)
    calls["recalibrate"] = lambda: pf.recalibrate(given, [X])
    for what, use in calls.items():
        with pytest.raises(pf.ArgumentError, match=says):
            pytest.fail(f"{what} gave {use()}")


@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper])
def test_a_wrapped_part_is_named(wrap):
    model, scales, plan = network()
    parts = nn.Sequential(model[:3], model[3:])
    scales = pf.scaling_factors(parts, X)
    plan = pf.plan(parts, X, scales, "fixed", value=0.0)
    other = copy.deepcopy(parts)
    other[0] = wrap(other[0])
    own = pf.scaling_factors(other, X)  # its own works
    found = pf.slim(other, pf.plan(other, X, own, "fixed", value=0.0))
    torch.testing.assert_close(computes(found), computes(parts))
    for use in (lambda: pf.slim(other, plan), lambda: pf.plan(other, X, scales)):
        with pytest.raises(pf.PlanError, match="a part of one of the two models is in a wrapper"):
            use()


def test_a_compiled_part_is_refused():
    model, _, _ = network()
    parts = nn.Sequential(torch.compile(model[:3], backend="eager"), model[3:])
    with pytest.raises(pf.TracingError, match=r"0 is compiled .*compile the slim one"):
        pf.scaling_factors(parts, X)


def test_a_class_named_like_torch_s_own_is_a_network():
    class Module(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    model, _, _ = network()
    assert len(pf.scaling_factors(Module(*model), X)) == 2


def test_the_fold_of_a_slim_model_is_known_in_a_wrapper():
    model, scales, plan = network()
    dropped = pf.slim(model, plan, fold="none")
    assert pf.verify(model, dropped, plan, X).exact  # β of the removed channels is 0 there, too
    assert pf.verify(model, Holder(dropped), plan, X).exact
