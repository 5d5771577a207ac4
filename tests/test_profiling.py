"""Expected against measured latency: layers that sleep as long as the test says."""

import json
import time

import pytest
import torch
from support.nets import Residual, conv_bn, settle
from torch import Tensor, nn

import polarfast as pf
from polarfast.layers import PutBack

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two convolutions that may lose channels, a head that loses inputs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_bn(3, width), nn.ReLU())
        self.second = nn.Sequential(*conv_bn(width, width), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def planned(model: nn.Module, gone: int, residual: str = "keep") -> pf.PruningPlan:
    """A plan that takes away the last `gone` channels of every layer."""
    settle(model, X).float()
    scales = pf.scaling_factors(model, X, residual=residual)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[-gone:] = 0
    return pf.plan(model, X, scales, "fixed", fold="none")


def sleeping(monkeypatch, kind: type[nn.Module], milliseconds) -> None:
    """Calls of such modules take so long beside what they take."""
    forward = kind.forward

    def slow(self: nn.Module, x: Tensor) -> Tensor:
        time.sleep(milliseconds(self) / 1000)
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", slow)


def test_as_deployed():
    """With no normalization left in either network."""
    model = Residual()
    plan = planned(model, 2, "expand")
    profile = plan.profile(model, example_inputs=X, seconds=0.01, fused=True)
    kinds = {row.kind for row in profile.layers}
    assert not any("BatchNorm" in kind for kind in kinds) and "Conv2d" in kinds
    plain = plan.profile(model, example_inputs=X, seconds=0.01)
    assert (profile.macs, profile.macs_before) == (plain.macs, plain.macs_before)
    assert any("BatchNorm" in row.kind for row in plain.layers)


@pytest.mark.slow
def test_time_that_follows_the_channels_is_measured_as_expected(monkeypatch):
    """16 → 4 channels; convolutions sleep 16 ms and 1/4 ms for each pair of channels."""
    model = Net()
    plan = planned(model, 12)
    sleeping(monkeypatch, nn.Conv2d, lambda conv: 16 + conv.in_channels * conv.out_channels / 4)
    profile = plan.profile(model, example_inputs=X, seconds=0.3)
    rows = {row.name: row for row in profile.layers}
    assert list(rows) == ["first.0", "first.1", "second.0", "second.1", "fc"]
    second = rows["second.0"]
    assert (second.channels_before, second.channels, second.kind) == ([16, 16], [4, 4], "Conv2d")
    assert 80 <= second.ms_before < 160 and 20 <= second.ms < 40
    assert 28 <= rows["first.0"].ms_before < 56 and 19 <= rows["first.0"].ms < 38
    assert profile.ms_before >= 108 and 39 <= profile.ms < profile.ms_before
    assert profile.measured == profile.ms_before / profile.ms
    assert rows["fc"].ms < 16 and rows["first.1"].ms < 16


def test_multiply_accumulates_are_those_of_the_plan_and_of_the_formula():
    model = Net()
    plan = planned(model, 12)
    profile = plan.profile(model, example_inputs=X, seconds=0.01)
    assert (profile.macs_before, profile.macs) == (plan.macs_before, plan.macs)
    rows = {row.name: row for row in profile.layers}
    pixels = 2 * 12 * 12
    assert rows["first.0"].macs_before == pixels * 9 * 3 * 16
    assert rows["first.0"].macs == pixels * 9 * 3 * 4
    assert rows["second.0"].macs == pixels * 9 * 4 * 4
    assert rows["fc"].macs == 2 * 4 * 4
    assert rows["second.0"].share == 1 / 16
    assert profile.expected == plan.macs_before / plan.macs
    larger = plan.profile(model, example_inputs=X.repeat(3, 1, 1, 1), seconds=0.01)
    assert larger.macs == 3 * plan.macs and larger.inputs["shape"][0] == 6


@pytest.mark.slow
@pytest.mark.parametrize(("gone", "advice"), [(5, "round_to=8"), (8, "larger batches")])
def test_layers_that_are_not_faster_are_pointed_out(monkeypatch, gone, advice):
    """16 → 11 and 16 → 8 channels, and each call as slow as before."""
    model = Net()
    plan = planned(model, gone)
    sleeping(monkeypatch, nn.Conv2d, lambda conv: 30)
    profile = plan.profile(model, example_inputs=X, seconds=0.1)
    (hint,) = [hint for hint in profile.hints if "gain little" in hint]
    assert "second.0" in hint and advice in hint
    assert "fc" not in hint
    line = next(line for line in str(profile).splitlines() if line.startswith("second.0"))
    assert line.endswith("not faster accordingly") and f"16×16 → {16 - gone}×{16 - gone}" in line


def test_put_back_that_costs_much_is_pointed_out(monkeypatch):
    model = Residual()
    plan = planned(model, 3, residual="expand")
    sleeping(monkeypatch, PutBack, lambda norm: 30)
    profile = plan.profile(model, example_inputs=X, seconds=0.1)
    put_back = [row for row in profile.layers if row.put_back]
    assert [row.name for row in put_back] == ["first.4", "second.4"]
    assert all(row.ms >= 30 > row.ms_before for row in put_back)
    (hint,) = [hint for hint in profile.hints if "put channels back" in hint]
    assert "residual='keep'" in hint and "2 norms" in hint


@pytest.mark.slow
def test_hooks_of_others_and_time_outside_layers_are_not_the_layers(monkeypatch):
    model = Net()
    plan = planned(model, 8)
    slim = pf.slim(model, plan)
    for net in (model, slim):
        net.second[0].register_forward_pre_hook(lambda module, args: time.sleep(0.03))
        net.second[0].register_forward_hook(lambda module, args, out: time.sleep(0.03))
        net.register_forward_hook(lambda module, args, out: time.sleep(0.02))
    profile = plan.profile(model, slim, X, seconds=0.1)
    row = next(row for row in profile.layers if row.name == "second.0")
    assert row.ms_before < 30 and row.ms < 30
    assert profile.ms_before >= 80 and profile.ms >= 80
    assert any("outside the layers that were pruned" in hint for hint in profile.hints)


def test_models_are_left_as_found():
    model = Net()
    plan = planned(model, 8)
    slim = pf.slim(model, plan)
    text, state = plan.to_json(), {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.second[1].eval()
    modes = [m.training for net in (model, slim) for m in net.modules()]
    plan.profile(model, slim, X, seconds=0.01)
    assert [m.training for net in (model, slim) for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert plan.to_json() == text


def test_the_plans_table_shows_what_was_measured():
    model = Net()
    plan = planned(model, 8)
    assert plan.profiled is None and "measured" not in str(plan)
    profile = plan.profile(model, seconds=0.01)  # its own slim model, on random inputs
    assert plan.profiled is profile and str(profile) in str(plan)
    assert "whole model" in str(plan) and f"{plan.macs:,} MACs" in str(profile)
    assert profile.inputs["shape"] == [2, 3, 12, 12]
    data = json.loads(json.dumps(profile.to_dict()))
    assert data["macs"] == plan.macs and data["layers"][0]["name"] == "first.0"
    assert pf.PruningPlan.from_json(plan.to_json()).profiled is None


def test_double_precision_and_wrapped_models():
    model = Net()
    plan = planned(model, 8)
    profile = plan.profile(nn.DataParallel(model.double()), example_inputs=X, seconds=0.01)
    assert profile.inputs["dtype"] == "float64"


def test_models_of_another_kind_are_refused():
    model = Net()
    plan = planned(model, 8)
    with pytest.raises(pf.ArgumentError, match="'down.0' is a layer of one of them only"):
        plan.profile(model, Residual(), X)
    with pytest.raises(pf.ArgumentError, match="seconds=0: pass how long"):
        plan.profile(model, seconds=0)
    with pytest.raises(pf.ArgumentError, match="model is on cpu, slim on meta"):
        plan.profile(model, Net().to("meta"), X)
    with pytest.raises(pf.PlanError, match="was the model already pruned"):
        plan.profile(Net(8), example_inputs=X)
