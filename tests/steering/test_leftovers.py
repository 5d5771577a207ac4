"""FlopsTarget with β: where constants would not fold exactly, nothing is left behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nets
from torch import nn

import polarfast as pf
from polarfast.planning.prediction import CutPredictor

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
STEPS = 150


class Padded(nn.Module):
    """A squeeze-excite gate behind a padded depthwise convolution (MobileNetV3)."""

    def __init__(self, act=nn.Hardswish):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), act()),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), act()),
        )
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.out = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.body(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.fc(F.relu(self.out(x * gate)).mean((2, 3)))


NETS = {
    "padded": Padded,
    "squeeze-excite": nets.SqueezeExcite,
    "bottlenecks": nets.Bottlenecks,
    "residual": nets.Residual,
    "grouped": nets.Grouped,
    "branches": nets.Branches,
    "chain": nets.chain,
}
LEAKING = {"padded", "squeeze-excite", "bottlenecks"}


pytestmark = pytest.mark.filterwarnings("ignore:FlopsTarget:UserWarning")  # 150 steps are few


def train(build, attached=False, **options):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12).repeat(16, 1, 1, 1) + 0.3 * torch.randn(64, 3, 12, 12)
    labels = torch.arange(4).repeat(16)
    model = build()
    scales = pf.scaling_factors(model, X)
    pf.init_scales(scales, 0.5)
    reg = pf.FlopsTarget(model, X, scales, 0.4, steps=STEPS, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if attached:
        pf.attach(optimizer, scales, reg)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if attached:
            optimizer.step()
        else:
            pf.step(optimizer, scales, reg)
    return model.eval(), scales, reg


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", sorted(LEAKING))
def test_nothing_is_left(name, attached):
    model, scales, reg = train(NETS[name], attached)
    assert "layers with β at 0 too" in repr(reg)
    plan = pf.plan(model, X, scales)
    assert plan.flops_reduction > 0.3 and not plan.inexact
    with torch.no_grad():
        torch.testing.assert_close(pf.slim(model, plan)(X), model(X), rtol=1e-3, atol=1e-3)


def test_where_beta_is_left_alone_it_shows():
    model, scales, reg = train(Padded, with_bias=False)
    assert "β" not in repr(reg)
    assert pf.plan(model, X, scales).inexact


@pytest.mark.parametrize("name", sorted(NETS.keys() - LEAKING))
def test_beta_stays_where_it_folds(name):
    """To the bit what it is without the option."""
    mine, other = train(NETS[name])[0], train(NETS[name], with_bias=False)[0]
    assert all(map(torch.equal, mine.parameters(), other.parameters()))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 99))
def test_layers_that_leak_are_those_that_plans_name(name, seed):
    """Half of the channels of one layer at a time: the plan is exact unless the layer leaks."""
    torch.manual_seed(seed)
    model = NETS[name]()
    nets.settle(model, X, seed=seed).float()
    scales = pf.scaling_factors(model, X)
    found = CutPredictor(model, X, scales).leaks()
    assert bool(found) == (name in LEAKING)
    for layer in scales:
        pruned = copy.deepcopy(model)
        factors = pf.scaling_factors(pruned, X)
        with torch.no_grad():
            factors[layer][::2] = 0
        plan = pf.plan(pruned, X, factors, "fixed", value=0.0)
        if layer not in found:
            assert not plan.inexact
        tensors = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
        with torch.no_grad():
            for vector in found.get(layer, ()):
                tensors[vector][::2] = 0
        assert not pf.plan(pruned, X, factors, "fixed", value=0.0).inexact


def test_it_goes_on_in_the_slim_form():
    torch.manual_seed(0)
    model = Padded()
    scales = pf.scaling_factors(model, X)
    pf.init_scales(scales, 0.5)
    reg = pf.FlopsTarget(model, X, scales, 0.5, steps=20)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        for name, others in reg.predictor.leaks().items():
            for each in (name, *(o for o in others if o.endswith("bias"))):
                model.get_parameter(each)[:8] = 0
    slim = pf.shrink(model, optimizer, pf.plan(model, X, scales, "fixed", value=0.0))
    factors = reg.follow(slim)
    gamma, bias, mean = slim.body[1].weight, slim.body[4].bias, slim.body[4].running_mean
    with torch.no_grad():
        gamma[2:4], bias[:] = 0, 0.02
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(slim(X), torch.tensor([0, 1])).backward()
        pf.step(optimizer, factors, reg)
    gone = gamma == 0
    assert len(bias) == 8 and gone[2:4].all() and not gone.all()
    assert not bias[gone].any() and not mean[gone].any() and bias[~gone].all()
