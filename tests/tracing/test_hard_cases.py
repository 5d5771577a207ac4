"""Networks, and ways to use them, in which other pruners or earlier versions of this one failed."""

import copy
from collections import deque
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from support.hard_nets import EXACT, INEXACT, Net, Scaled, body, tail
from support.masked import TOLERANCE, error, masked
from support.nets import Residual, X, conv_bn, empty, prepared, settle, zero
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "none"])
@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_slim_is_what_the_plan_says(name, fold):
    model, scales = prepared({**EXACT, **INEXACT}[name])
    plan = pf.plan(model, X, scales, "fixed", fold=fold)
    slim = pf.slim(model, plan)  # raises if it is not what the plan says
    assert plan.inexact == slim.polarfast_info.inexact == pf.verify(model, slim, plan, X).notes
    assert bool(plan.inexact) == (name in INEXACT and fold == "exact")
    if not plan.inexact:
        assert error(masked(model, plan, fold == "none"), slim) < TOLERANCE
    for candidate, macs in ((model, plan.macs_before), (slim, plan.macs)):
        with FlopCounterMode(display=False) as counter:
            candidate(X.clone())
        assert macs == counter.get_total_flops() // 2
    assert plan.params == sum(param.numel() for param in slim.parameters())


def test_one_inexact_reader_hides_nothing(monkeypatch):
    """The check compares with what was claimed for it, and everything else must be equal."""
    from polarfast.slimming import slim as slimming

    model, scales = prepared(INEXACT["squeeze-excite behind an exact reader"])
    plan = pf.plan(model, X, scales, "fixed")
    write = slimming.write_edits

    def wrong(*args):
        edits = write(*args)
        edits.tensors["a.7.running_mean"] = edits.tensors["a.7.running_mean"] + 0.01
        return edits

    monkeypatch.setattr(slimming, "write_edits", wrong)
    with pytest.raises(pf.VerificationError, match="not what the plan says"):
        pf.slim(model, plan)


def test_a_gate_that_hardly_moves_is_named_too():
    """What it multiplies changes with every fold before it that is not exact."""
    model, scales = prepared(
        lambda: Net(
            lambda n, x: n.end(n.two(n.one(n.a(x)))),
            a=body(),
            one=Excite(),
            two=Excite(),
            end=nn.Sequential(*conv_bn(8, 6, 1), *tail(6)),
        )
    )
    with torch.no_grad():
        model.two.gate[1].weight.mul_(1e-11)
    plan = pf.plan(model, X, scales, "fixed")
    assert set(plan.inexact) == {"one.last.0.weight", "two.last.0.weight"}
    pf.slim(model, plan)


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(*conv_bn(8, 8, 1), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gate(x)
        return self.last(x)


def test_inputs_and_ambient_modes_are_left_alone():
    model, scales = prepared(EXACT["input changed in place"])
    x = X.clone()
    pf.slim(model, pf.plan(model, x, scales, "fixed"))
    assert torch.equal(x, X)
    model = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *tail(8))
    names = list(pf.scaling_factors(model, X.float()))
    with torch.inference_mode():
        assert list(pf.scaling_factors(model, X.float())) == names
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert list(pf.scaling_factors(model, X.float())) == names


def test_buffers_that_forward_replaces_are_put_back():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.end = body(), nn.Sequential(*tail(8))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.end(self.a(x))

    model = Counting()
    before = model.calls
    pf.scaling_factors(model, X.float())
    assert model.calls is before and float(before) == 0


class Out:
    def __init__(self, features: Tensor) -> None:
        self.features = features


@dataclass(slots=True)
class Slots:
    features: Tensor


KINDS = {
    "object": Out,
    "slots": Slots,
    "deque": lambda features: deque([features]),
    "function": lambda features: lambda: features,
    "partial": lambda features: partial(torch.add, features),
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_in_objects_are_outputs(kind):
    def forward(net, x):
        features = net.a(x)
        return net.end(net.free(features)), KINDS[kind](features)

    net = Net(forward, a=body(), free=body(8, 6), end=nn.Sequential(*tail(6)))
    scales = pf.scaling_factors(net, X.float())
    assert list(scales) == ["free.1.weight"]
    assert "output of the network" in scales.pinned["a.1.weight"]


def test_files_hold_buffers_outside_the_state_dict(tmp_path):
    model, scales = prepared(Scaled)
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", lambda: Scaled().double().eval())
    assert torch.equal(loaded(X), slim(X))


def test_slim_models_can_be_slimmed_again(tmp_path):
    model, first = prepared(
        lambda: nn.Sequential(*conv_bn(3, 16), nn.ReLU(), *conv_bn(16, 8), *tail(8)), "expand"
    )
    slim = pf.slim(model, pf.plan(model, X, first, "fixed"))
    again = pf.scaling_factors(slim, X, residual="expand")
    zero(again, seed=5)
    plan = pf.plan(slim, X, again, "fixed")
    small = pf.slim(slim, plan)
    assert plan.params < plan.params_before
    pf.save(small, plan, tmp_path / "small.pt")
    original = copy.deepcopy(model)
    loaded = pf.load(tmp_path / "small.pt", lambda: original)
    assert torch.equal(loaded(X), small(X))


def test_adam_with_a_parameter_of_one_element_and_named_groups():
    net = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *tail(8)[:2], nn.Linear(8, 1, bias=False))
    model = settle(net, X)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-6)
    model(X).sum().backward()
    optimizer.step()
    scales = pf.scaling_factors(model, X)
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X, scales, "fixed"), optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert slim[5].bias is not None and len(group["params"]) == len(group["param_names"])


def test_layers_left_out_by_the_user_are_left_alone():
    model, scales = prepared(Residual, "expand", share=0)
    chosen = scales.select("first.4")
    empty(chosen, ["first.4.weight"])
    plan = pf.plan(model, X, chosen)
    slim = pf.slim(model, plan)
    assert slim.first[0].out_channels == 6 and plan.kept["first.4.weight"].numel() == 0


def test_a_network_that_casts_is_worked_out_in_float64_all_the_same():
    net = Net(
        lambda n, x: n.end(n.b(n.a(x.float()).to(torch.float32)).float()),
        a=settle(body(), torch.randn(4, 3, 10, 10)),
        b=settle(body(8, 6), torch.rand(4, 8, 10, 10)),
        end=nn.Sequential(*tail(6)),
    )
    net = net.float().eval()
    scales = pf.scaling_factors(net, X)
    zero(scales)
    plan = pf.plan(net, X, scales, "fixed")
    slim = pf.slim(net, plan)
    assert not plan.inexact and pf.verify(net, slim, plan, X).exact
    assert error(masked(net, plan, False), slim) < 1e-5


def test_a_network_with_a_dtype_of_its_own_is_told_what_to_do():
    def fixed(net: nn.Module, x: Tensor) -> Tensor:
        return net.end(net.b(net.a(x)).mean((2, 3)) @ torch.eye(6, dtype=torch.float32))

    net = Net(fixed, a=body(), b=nn.Conv2d(8, 6, 1), end=nn.Linear(6, 3)).eval()
    scales = pf.scaling_factors(net, X.float())
    zero(scales)
    with pytest.raises(pf.PlanError, match="float64.*dtype=x.dtype"):
        pf.plan(net, X.float(), scales, "fixed")


def test_default_dtype_and_device_of_the_user(tmp_path):
    model, scales = prepared(EXACT["conv, activation, norm"])
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # whatever is made without a device cannot be computed with
    try:
        pf.scaling_factors(model, X, residual="couple")
        assert pf.thresholds(scales).keys() == scales.keys()
        plan = pf.plan(model, X, scales, "fixed")
        predictor = pf.CutPredictor(model, X, scales, "fixed")
        assert predictor.cut() == pytest.approx(plan.flops_reduction)
        pf.reachable(model, X, scales)
        slim = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
        pf.save(slim, plan, tmp_path / "slim.pt")
        assert pf.verify(model, slim, plan, X).exact
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
