"""A plan keeps its trace and its constants for `slim`, under one rule each; what these rules do not
see, the verification does.
"""

import copy
import functools
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.masked import TOLERANCE, error, masked
from support.nets import Residual, chain, conv_bn, settle, zero
from torch import Tensor, nn

import polarfast as pf
from polarfast.slimming import slim as slimming
from polarfast.tracing import classes

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
    trace = classes.trace

    def counted(*args):
        count.append(1)
        return trace(*args)

    monkeypatch.setattr(classes, "trace", counted)
    return count


@pytest.mark.parametrize("build", [Net, chain, Residual])
def test_slim_takes_over_what_the_plan_holds(build, traces, monkeypatch):
    model, scales = make(build)
    plan = pf.plan(model, X, scales.select("."), "fixed")
    wanted = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))  # knows nothing
    assert len(traces) == 3  # scaling_factors, plan and this slim
    monkeypatch.setattr(slimming, "fold_constants", None)
    slim = pf.slim(model, plan)
    assert len(traces) == 3
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


#: The rules see these: other names, types, shapes or values.
SEEN = [data, in_place, loaded, assigned, weights, statistics, swapped, gated]
#: These do not change what was traced and folded,
HARMLESS = [flagged, padded, overridden]
#: and these do.
UNSEEN = [reconfigured, nested, hooked]


@pytest.mark.parametrize("edit", SEEN)
def test_edits_between_plan_and_slim(edit):
    """What is built is what a plan that knows nothing of the model before would give."""
    model, scales = make()
    plan = pf.plan(model, X, scales.select(r"^a\."), "fixed")
    edit(model)
    slim = pf.slim(model, plan, verify=False)
    wanted = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
    assert all(map(torch.equal, slim.state_dict().values(), wanted.state_dict().values()))
    assert error(masked(model, plan, False), slim) < TOLERANCE


@pytest.mark.parametrize("edit", HARMLESS)
def test_edits_that_need_no_new_trace(edit):
    model, scales = make()
    plan = pf.plan(model, X, scales.select(r"^a\."), "fixed")
    edit(model)
    assert error(masked(model, plan, False), pf.slim(model, plan)) < TOLERANCE


@pytest.mark.parametrize("edit", UNSEEN)
def test_edits_that_the_verification_answers(edit):
    model, scales = make()
    chosen = scales.select(r"^a\.")
    plan = pf.plan(model, X, chosen, "fixed")
    edit(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(pf.VerificationError, match="has changed since the plan was made"):
        pf.slim(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    anew = pf.plan(model, X, chosen, "fixed")
    assert error(masked(model, anew, False), pf.slim(model, anew)) < TOLERANCE


@pytest.mark.parametrize("edit", [swapped, flagged, padded, hooked, nested, reconfigured, gated])
def test_a_plan_traces(edit):
    """Whatever has changed since `scaling_factors`."""
    model, scales = make()
    chosen = scales.select(r"^a\.")
    edit(model)
    plan = pf.plan(model, X, chosen, "fixed")
    fresh = pf.plan(model, X, pf.scaling_factors(model, X).select(r"^a\."), "fixed")
    assert plan.to_json() == fresh.to_json()
    assert error(masked(model, plan, False), pf.slim(model, plan)) < TOLERANCE


def test_other_inputs():
    model, scales = make()
    small = pf.plan(model, X, scales, "fixed")
    large = pf.plan(model, torch.randn(3, 3, 20, 20, dtype=torch.float64), scales, "fixed")
    assert large.macs_before > 3 * small.macs_before
    small.inputs = large.inputs  # a plan can be edited
    assert error(masked(model, small, False), pf.slim(model, small)) < TOLERANCE


def test_a_buffer_that_steers():
    model, scales = make()
    model.register_buffer("on", torch.zeros(1, dtype=torch.uint8))
    model.act = lambda x: torch.relu(x)[:, ::2].repeat(1, 2, 1, 1) if model.on.item() else x.relu()
    plan = pf.plan(model, X, scales, "fixed")
    model.on.fill_(1)
    with pytest.raises(pf.VerificationError, match="or has changed since the plan was made"):
        pf.slim(model, plan)
    with pytest.raises(pf.PlanError, match="cut at constant positions"):
        pf.plan(model, X, scales, "fixed")


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


def test_it_belongs_to_this_model_in_this_process_only(traces):
    model, scales = make()
    plan = pf.plan(model, X, scales, "fixed")
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin.to_json() == plan.to_json() and vars(twin).keys() == vars(plan).keys()
        assert twin._traced is None and twin._folded is None
    other = settle(Net(), torch.randn(4, 3, 10, 10), seed=5)
    before = len(traces)
    slim = pf.slim(other, plan)
    assert len(traces) == before + 1 and error(masked(other, plan, False), slim) < TOLERANCE


def test_constants_on_another_device_are_worked_out_anew():
    model, scales = make()
    plan = pf.plan(model, X, scales, "fixed")
    channels, fold = plan._traced.channels, plan._folded
    alive, forced = fold._alive, fold.fold.constant
    assert fold.fits(model, channels, alive, forced, "exact")
    assert not fold.fits(copy.deepcopy(model).to("meta"), channels, alive, forced, "exact")


def test_a_plan_keeps_no_model_alive():
    model, scales = make()
    plan = pf.plan(model, X, scales, "fixed")
    refs = [weakref.ref(model), weakref.ref(model.fc.weight)]
    del model, scales
    gc.collect()
    assert [ref() for ref in refs] == [None, None] and plan._traced is not None


class Kernel(nn.Module):
    """Reads a norm's channels by a kernel of its own, without a module that could have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.kernel = nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.norm(self.conv(x))), self.kernel).mean((2, 3))


def test_a_reader_without_a_place_for_a_bias() -> None:
    """A constant channel stands for the constants; without it they are lost, and that is said."""
    model, x = Kernel().eval(), torch.randn(1, 3, 8, 8)
    scales = pf.scaling_factors(model, x)
    with torch.no_grad():
        model.norm.weight[:4] = 0
        model.norm.bias.fill_(0.5)
    exact = pf.plan(model, x, scales)
    assert not exact.inexact and exact.layers["norm.weight"].constant == [0]
    lost = pf.plan(model, x, scales, fold="bias")
    assert lost.inexact == {"kernel": "its layer has no bias that could take up a constant"}
    assert not pf.verify(model, pf.slim(model, lost), lost, x).exact


def test_a_copy_that_was_trained_on_is_told_of(recwarn) -> None:
    """An average of the network is no other one; one whose γ have grown again is."""
    model = Net()
    settle(model, X)
    scales = pf.scaling_factors(model, X)
    zero(scales)
    with torch.no_grad():
        next(iter(scales.values()))[1] = 0.005  # goes, and the plan says so
    plan = pf.plan(model, X, scales, "fixed", value=0.01)
    later = copy.deepcopy(model)
    pf.slim(later, plan)
    assert not [w for w in recwarn.list if "not the object" in str(w.message)]
    with torch.no_grad():
        for name in scales:
            later.get_parameter(name).add_(0.3)
    with pytest.warns(UserWarning, match="not the object that was planned, the channels that go"):
        pf.slim(later, plan)
