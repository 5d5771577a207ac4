"""What was traced once is used again, and never for a model that has changed since."""

import copy
import functools
import gc
import pickle
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.masked import TOLERANCE, error, masked
from support.nets import Residual, chain, conv_bn, settle, zero
from torch import Tensor, nn

import polarfast as pf
from polarfast.slimming import slim as slimming
from polarfast.tracing import cache as retracing

X = torch.randn(3, 3, 10, 10, dtype=torch.float64)


class Net(nn.Module):
    """A network whose code asks for attributes of many kinds."""

    wide = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(*conv_bn(3, 8)), nn.Sequential(*conv_bn(8, 6))
        self.c = nn.Sequential(*conv_bn(8, 6, 1))
        self.fc = nn.Linear(6, 4)
        self.second, self.config = True, SimpleNamespace(sizes=[1, 2], slope=0.0)
        self.act = functools.partial(F.leaky_relu, negative_slope=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x)) - self.config.slope
        out = self.b(x)
        if self.second:
            out = out + self.c(x)
        if not self.wide:
            out = out[:, :, ::2]
        return self.fc(F.silu(out).mean((2, 3)))


def make(build=Net):
    torch.manual_seed(0)
    model = settle(build(), torch.randn(4, 3, 10, 10))
    scales = pf.scaling_factors(model, X)
    zero(scales)
    return model, scales


@pytest.fixture
def traces(monkeypatch):
    """How often a model was traced."""
    count = []
    trace = retracing.trace

    def counted(*args):
        count.append(1)
        return trace(*args)

    monkeypatch.setattr(retracing, "trace", counted)
    return count


@pytest.mark.parametrize("build", [Net, chain, Residual])
def test_one_trace_and_one_fold_do(build, traces, monkeypatch):
    model, scales = make(build)
    plan = pf.plan(model, X, scales.select("."), "fixed")
    wanted = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))  # knows nothing
    assert len(traces) == 2
    monkeypatch.setattr(slimming, "fold_constants", None)
    slim = pf.slim(model, plan)
    assert len(traces) == 2
    assert all(map(torch.equal, slim.state_dict().values(), wanted.state_dict().values()))
    assert error(masked(model, plan, False), slim) < TOLERANCE


def data(model):
    for param in model.parameters():
        param.data.add_(0.1 * torch.sin(torch.arange(param.numel()).double()).view(param.shape))


def in_place(model):
    with torch.no_grad():
        model.get_parameter("a.1.bias").copy_(torch.randn(8, dtype=torch.float64))


def loaded(model):
    other = settle(Net(), torch.randn(4, 3, 10, 10), seed=3)
    model.load_state_dict(other.state_dict())


def assigned(model):
    other = settle(Net(), torch.randn(4, 3, 10, 10), seed=3)
    model.load_state_dict(other.state_dict(), assign=True)


def weights(model):
    model.b[0].weight.data.mul_(2)


def statistics(model):
    model.b[1].running_mean.add_(1)


def swapped(model):
    model.act = nn.Sigmoid()


def reconfigured(model):
    model.act = functools.partial(F.leaky_relu, negative_slope=0.25)


def nested(model):
    model.config.slope = 0.5


def flagged(model):
    model.second = False


def padded(model):
    model.b[0] = nn.Conv2d(8, 6, 3, bias=False).double()
    model.c[0].stride, model.wide = (1, 1), True
    model.second = False


def hooked(model):
    model.a.register_forward_hook(lambda module, args, out: out * 2 + 1)


def overridden(model):
    forward = model.forward
    model.forward = lambda x: forward(x.flip(2)) * 2


def gated(model):
    model.b[1] = nn.GroupNorm(2, 6).double()


EDITS = [
    data, in_place, loaded, assigned, weights, statistics, swapped, reconfigured, nested, flagged,
    padded, hooked, overridden, gated,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_plan_and_slim(edit):
    """What is built is what a plan that knows nothing of the model before would give."""
    model, scales = make()
    plan = pf.plan(model, X, scales.select(r"^a\."), "fixed")
    edit(model)
    slim = pf.slim(model, plan, verify=False)
    wanted = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
    assert all(map(torch.equal, slim.state_dict().values(), wanted.state_dict().values()))
    assert error(masked(model, plan, False), slim) < TOLERANCE


@pytest.mark.parametrize("edit", [swapped, flagged, padded, hooked, nested, reconfigured, gated])
def test_edits_between_scaling_factors_and_plan(edit, traces):
    model, scales = make()
    chosen = scales.select(r"^a\.")
    edit(model)
    plan = pf.plan(model, X, chosen, "fixed")
    assert len(traces) == 2
    fresh = pf.plan(model, X, pf.scaling_factors(model, X).select(r"^a\."), "fixed")
    assert plan.to_json() == fresh.to_json()


def test_a_class_that_changes(monkeypatch, traces):
    model, scales = make()
    monkeypatch.setattr(Net, "wide", False)
    pf.plan(model, X, scales, "fixed")
    monkeypatch.setattr(Net, "forward", lambda self, x: self.fc(self.b(self.a(x)).mean((2, 3))))
    pf.plan(model, X, scales.select(r"^a\."), "fixed")
    assert len(traces) == 3


def test_a_buffer_that_steers(traces):
    model, scales = make()
    model.register_buffer("on", torch.zeros(1, dtype=torch.uint8))
    model.act = lambda x: torch.relu(x)[:, ::2].repeat(1, 2, 1, 1) if model.on.item() else x.relu()
    scales = pf.scaling_factors(model, X)
    model.train()(X)  # which changes what norms keep
    plan = pf.plan(model.eval(), X, scales, "fixed")
    assert len(traces) == 2 and "a.1.weight" in plan.kept
    model.on.fill_(1)
    with pytest.raises(pf.PlanError, match="cut at constant positions"):
        pf.slim(model, plan)
    with pytest.raises(pf.PlanError, match="cut at constant positions"):
        pf.plan(model, X, scales, "fixed")


def test_other_inputs(traces):
    model, scales = make()
    small = pf.plan(model, X, scales, "fixed")
    large = pf.plan(model, torch.randn(3, 3, 20, 20, dtype=torch.float64), scales, "fixed")
    assert len(traces) == 2 and large.macs_before > 3 * small.macs_before
    small.inputs = large.inputs  # a plan can be edited
    pf.slim(model, small)
    assert len(traces) == 3


def test_a_plan_that_was_edited():
    model, scales = make()
    plan = pf.plan(model, X, scales.select(r"^a\."), "fixed")
    plan.kept["a.1.weight"] = torch.tensor([0, 5])
    plan.layers["a.1.weight"].constant = [1]
    with torch.no_grad():
        scales["a.1.weight"].fill_(1.0)
    slim = pf.slim(model, plan)
    assert slim.a[0].out_channels == 3
    assert error(masked(model, plan, False), slim) < TOLERANCE
    assert error(masked(model, plan, True), pf.slim(model, plan, fold="none")) < TOLERANCE
    plan.fold = "none"
    plan.layers["a.1.weight"].constant = []
    assert error(masked(model, plan, True), pf.slim(model, plan)) < TOLERANCE


def test_what_cannot_be_judged_is_traced_anew(traces):
    class Other:
        slope = 0.0

    @dataclass(slots=True)
    class Slots:
        slope: float = 0.0

    model, scales = make()
    model.config, model.more = Other(), Slots()
    scales = pf.scaling_factors(model, X)
    pf.plan(model, X, scales, "fixed")
    assert len(traces) == 3


def test_it_belongs_to_this_model_in_this_process_only(traces):
    model, scales = make()
    plan = pf.plan(model, X, scales, "fixed")
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin.to_json() == plan.to_json() and vars(twin).keys() == vars(plan).keys()
        assert twin._made is None
    assert copy.deepcopy(scales)._traced is None
    other = settle(Net(), torch.randn(4, 3, 10, 10), seed=5)
    assert len(traces) == 1
    slim = pf.slim(other, plan)
    assert len(traces) == 2 and error(masked(other, plan, False), slim) < TOLERANCE


def test_a_plan_keeps_no_model_alive():
    model, scales = make()
    plan = pf.plan(model, X, scales, "fixed")
    refs = [weakref.ref(model), weakref.ref(model.fc.weight)]
    del model, scales
    gc.collect()
    assert [ref() for ref in refs] == [None, None] and plan._made is not None


def test_a_flag_outside_the_model_shows_when_the_result_is_checked(monkeypatch, traces):
    """The module's namespace cannot be watched; a slim model that differs is made anew."""
    switch = {"on": False}

    class Switched(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.extra(self.a(x)).mean() if switch["on"] else 0.0)

    torch.manual_seed(0)
    model = Switched()
    model.extra = nn.Conv2d(8, 8, 3, padding=1)
    settle(model, torch.randn(4, 3, 10, 10))
    scales = pf.scaling_factors(model, X)
    zero(scales)
    plan = pf.plan(model, X, scales, "fixed", fold="none")
    before = len(traces)
    switch["on"] = True
    slim = pf.slim(model, plan)
    assert len(traces) == before + 1 and slim.extra.in_channels < 8
    assert error(masked(model, plan, True), slim) < TOLERANCE
