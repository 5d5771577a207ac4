"""FlopsTarget steers the factors of the step: rebound ones, or fewer than are pruned."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.nets import conv_bn
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polarfast as pf

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """A stem and two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16))
        self.blocks = nn.ModuleList(
            nn.Sequential(*conv_bn(16, 24), nn.ReLU(), *conv_bn(24, 16)) for _ in range(2)
        )
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


INNER = r"blocks\.\d\.1"


def make() -> tuple[nn.Module, pf.ScalingFactors]:
    torch.manual_seed(0)
    model = Blocks()
    scales = pf.scaling_factors(model, X, residual="expand")
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(0.2, 0.9)
    return model, scales


def train(model: nn.Module, scales: pf.ScalingFactors, reg: pf.Regularizer, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, 8, 8, generator=generator)
        labels = torch.randint(4, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        pf.step(optimizer, scales, reg)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [False, True])
def test_fewer_are_stepped_than_are_pruned(gone: bool) -> None:
    """The share is that of all; only those that are stepped make for it."""
    model, scales = make()
    chosen = scales.select(INNER)
    last = scales["blocks.1.4.weight"]  # not stepped
    with torch.no_grad():
        for name, gamma in scales.items():
            if name not in chosen:
                gamma.fill_(0.5)
        if gone:
            last[:12] = 0.0
            last.requires_grad_(False)
    reg = pf.FlopsTarget(model, X, scales, 0.5, steps=150, clamp="all")
    train(model, chosen, reg, 150)
    plan = pf.plan(model.eval(), X, scales)
    assert abs(plan.flops_reduction - 0.5) < 0.02
    assert plan.flops_reduction == pytest.approx(reg.predictor.cut())
    kept = {name: kept.numel() / scales[name].numel() for name, kept in plan.kept.items()}
    assert kept["blocks.1.4.weight"] == (0.25 if gone else 1.0)
    assert kept["blocks.0.4.weight"] == 1.0 and kept["blocks.0.1.weight"] < 0.7
    alone = pf.plan(model, X, chosen).flops_reduction
    assert alone < plan.flops_reduction - 0.05 if gone else alone == plan.flops_reduction


def test_the_others_get_the_task_s_gradient_alone() -> None:
    model, scales = make()
    chosen = scales.select(INNER)
    reg = pf.FlopsTarget(model, X, scales, 0.3, steps=10)
    reg.load_state_dict({**reg.state_dict(), "step": 5})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    before = {n: g.grad.clone() for n, g in scales.items() if g.grad is not None}
    pf.step(optimizer, chosen, reg)
    for name, gamma in scales.items():
        assert gamma.grad is not None
        assert torch.equal(gamma.grad, before[name]) == (name not in chosen), name


def test_parameters_that_were_replaced() -> None:
    """load_state_dict(assign=True) puts new parameters in the place of the old."""
    model, scales = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    reg = pf.FlopsTarget(model, X, scales, 0.5, steps=30)
    train(model, scales, reg, 30)
    other, found = make()
    late = pf.FlopsTarget(other, X, found, 0.5, steps=30)
    other.load_state_dict(state, assign=True)
    again = found.rebind(other)
    assert all(again[name] is not found[name] for name in found)
    train(other, again, late, 30)
    assert late.state_dict() == reg.state_dict() and late.predictor.cut() == reg.predictor.cut()
    for name, gamma in scales.items():
        assert torch.equal(again[name], gamma)


def refused(model: nn.Module, scales: Any, reg: pf.Regularizer, message: str) -> None:
    """The step says so and moves nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(X).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pf.ArgumentError, match=message):
        pf.step(optimizer, scales, reg)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_factors_that_do_not_fit_are_refused() -> None:
    model, scales = make()
    chosen = scales.select(INNER)
    reg = pf.FlopsTarget(model, X, chosen, 0.3)
    refused(model, scales, reg, r"'blocks.0.4.weight' is stepped, and is not among the scales")
    part = pf.ScalingFactors(dict(chosen))
    reg = pf.FlopsTarget(model, X, scales, 0.3)
    refused(model, part, reg, "lack 'blocks.0.4.weight', which is predicted to be pruned too")
    other = copy.deepcopy(model)
    refused(other, scales.rebind(other), reg, "no parameter of the model that this prediction")
    reg = pf.FlopsTarget(model, X, scales, 0.9)
    some = scales.select(r"blocks\.1\.1")
    refused(model, some, reg, r"factors that are stepped can cut 0\.\d+ of the MACs at most")


def test_one_set_of_factors_at_a_time() -> None:
    model, scales = make()
    reg = pf.FlopsTarget(model, X, scales, 0.3)
    train(model, scales, reg, 1)
    refused(model, scales.select(INNER), reg, "make one for each set of factors")
    train(model, scales.rebind(model), reg, 1)
    assert reg.state_dict()["step"] == 2


@pytest.mark.parametrize("setting", [{"weights": {"blocks.0.1.weight": 2.0}}, {"per_layer": True}])
def test_what_steering_does_not_know_is_refused(setting: dict[str, Any]) -> None:
    model, scales = make()
    reg = pf.FlopsTarget(model, X, scales, 0.3)
    for name, value in setting.items():
        setattr(reg, name, value)
    refused(model, scales, reg, "no layer weights")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("pattern", [INNER, "."])
def test_sharded_factors_are_steered_as_plain_ones(process_group: None, pattern: str) -> None:
    model, scales = make()
    with torch.no_grad():
        for name in scales:  # a removed channel calls for a constant channel
            model.get_parameter(name.removesuffix("weight") + "bias").fill_(0.1)
    plain = copy.deepcopy(model)
    reg = pf.FlopsTarget(model, X, scales, 0.3, steps=10)
    wanted = pf.FlopsTarget(plain, X, scales.rebind(plain), 0.3, steps=10)
    for each in (reg, wanted):
        each.load_state_dict({**each.state_dict(), "step": 4})
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    train(model, scales.rebind(model).select(pattern), reg, 3)
    train(plain, scales.rebind(plain).select(pattern), wanted, 3)
    assert reg.lam == wanted.lam > 0 and reg.state_dict()["count"] == wanted.state_dict()["count"]
    names = list(scales)[:2]
    assert reg.predictor.largest_cut(names) == wanted.predictor.largest_cut(names) > 0
