"""A network made smaller in the middle of its training goes on as the large one would."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import Residual, SqueezeExcite, chain
from torch import nn

import polarfast as pf

X = torch.randn(2, 3, 12, 12)


def start(build=Residual, seed=0):
    torch.manual_seed(seed)
    model = build()
    return model, pf.scaling_factors(model, X, residual="expand")


def silence(scales, pattern="", every=2):
    with torch.no_grad():
        for gamma in scales.select(pattern).values() if pattern else scales.values():
            gamma[::every] = 0


def steps(model, optimizer, count, first=0):
    """Losses of some training steps."""
    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 12, 12, generator=generator)
        optimizer.zero_grad()
        out = model(images)
        loss = F.cross_entropy(out, torch.arange(8) % out.shape[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_output_is_the_same_and_the_optimizer_goes_on():
    model, scales = start()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    steps(model, optimizer, 3)
    silence(scales)
    model.eval()
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    assert plan.flops_reduction > 0.1
    before = copy.deepcopy(model)(X)
    model.train()
    images = torch.randn(16, 3, 12, 12)
    in_training = copy.deepcopy(model)(images)
    slim = pf.shrink(model, optimizer, plan)
    torch.testing.assert_close(copy.deepcopy(slim)(images), in_training, rtol=1e-3, atol=1e-3)
    assert slim.training and type(slim) is type(model)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in slim.parameters()
    }
    torch.testing.assert_close(slim.eval()(X), before, rtol=1e-4, atol=1e-4)
    assert all("momentum_buffer" in optimizer.state[p] for p in slim.parameters())
    slim.train()
    losses = steps(slim, optimizer, 20, first=3)
    assert losses[-1] < losses[0]


def test_what_is_not_at_zero_stays():
    model, scales = start()
    silence(scales)
    with torch.no_grad():
        name = next(iter(scales))
        scales[name][0] = 0.3
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    before = copy.deepcopy(optimizer.state_dict())
    plan = pf.plan(model, X, scales, "fixed", value=0.5)
    with pytest.raises(pf.ArgumentError, match=f"channels of {name} with γ up to 0.3 would go"):
        pf.shrink(model, optimizer, plan)
    assert optimizer.state_dict() == before


def test_gates_are_for_the_end():
    model, _ = start(chain)
    scales = pf.add_gates(model, X)
    silence(scales)
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    with pytest.raises(pf.ArgumentError, match="has gates"):
        pf.shrink(model, torch.optim.SGD(model.parameters(), 0.1), plan)


def test_an_emptied_branch():
    model, scales = start()
    name = list(scales)[0]
    with torch.no_grad():
        scales[name].zero_()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    slim = pf.shrink(model, optimizer, plan)
    steps(slim, optimizer, 2)


@pytest.mark.slow
def test_flops_target_goes_on_with_the_smaller_network():
    """The share is that of the network that training began with."""
    images = torch.randn(4, 3, 12, 12).repeat(32, 1, 1, 1) + 0.3 * torch.randn(128, 3, 12, 12)
    labels = torch.arange(4).repeat(32)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24))
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    *(nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
                    *(nn.Conv2d(32, 24, 3, padding=1), nn.BatchNorm2d(24)),
                )
                for _ in range(3)
            )
            self.head = nn.Linear(24, 4)

        def forward(self, x):
            x = F.relu(self.stem(x))
            for block in self.blocks:
                x = F.relu(x + block(x))
            return self.head(x.mean((2, 3)))

    model, scales = start(Net)
    first = pf.plan(model, X, scales, "percentile", value=0.0).macs_before
    pf.init_scales(scales, 0.5)
    reg = pf.FlopsTarget(model, X, scales, 0.6, steps=300)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sizes, live = [], []
    for step in range(300):
        rows = torch.randperm(128, generator=torch.Generator().manual_seed(step))[:32]
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        pf.step(optimizer, scales, reg)
        live.append(reg.live)
        if step in (163, 223):
            plan = pf.plan(model, X, pf.scaling_factors(model, X, "expand"), "fixed", value=0.0)
            model = pf.shrink(model, optimizer, plan)
            scales = reg.follow(model)
            sizes.append(plan.macs)
            fresh, factors = start(Net)  # as in another process, from a checkpoint
            again = pf.FlopsTarget(fresh, X, factors, 0.6, steps=300)
            again.follow(model)
            again.load_state_dict(reg.state_dict())
            assert again.state_dict() == reg.state_dict()
            reg = again
    assert first > sizes[0] > sizes[1]
    assert all(abs(live[at + reg._every] - live[at]) < 0.06 for at in (163, 223))
    assert abs(reg.live - 0.6) <= 0.015
    dense, _ = start(Net)
    model.polarfast_info.origin.write_back(model, dense)
    plan = pf.plan(dense.eval(), X, pf.scaling_factors(dense, X, "expand"))
    assert abs(plan.flops_reduction - reg.live) < 1e-6
    slim = pf.slim(dense, plan)
    assert (slim(images).argmax(1) == labels).float().mean() > 0.9


def test_another_network_is_refused():
    model, scales = start()
    reg = pf.FlopsTarget(model, X, scales, 0.3, steps=10)
    with pytest.raises(pf.ArgumentError, match="no slim form"):
        reg.follow(start()[0])
    other, factors = start(chain)
    silence(factors)
    plan = pf.plan(other, X, factors, "fixed", value=0.0)
    slim = pf.shrink(other, torch.optim.SGD(other.parameters(), 0.1), plan)
    with pytest.raises(pf.ArgumentError, match="no slim form"):
        reg.follow(slim)


def test_what_would_not_fold_exactly_stays():
    model, scales = start(SqueezeExcite)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::2] = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.bias)
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    assert plan.inexact
    with pytest.raises(pf.ArgumentError, match="does not fold exactly"):
        pf.shrink(model, torch.optim.SGD(model.parameters(), 0.1), plan)
