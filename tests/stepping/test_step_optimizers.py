"""pf.step and pf.attach around any optimizer: hooks, closures, groups, accumulation, frozen γ."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stepping import (
    SIZES,
    Oracle,
    assert_same,
    l1,
    make_scales,
    set_gradients,
    task_gradients,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import L1, Polarization
from polarfast.stepping.step import attach, step

LAM, T = 0.02, 1.2

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    f"{kind.__name__}-{name}": lambda params, kind=kind, options=options: kind(
        params, lr=0.01, weight_decay=0.01, **options
    )
    for kind, implementations in (
        (SGD, ("plain", "foreach", "fused")),
        (Adam, ("plain", "foreach", "fused")),
        (AdamW, ("plain", "foreach", "fused")),
        (RMSprop, ("plain", "foreach")),
    )
    for name, options in (
        ("plain", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
    if name in implementations
}


@pytest.mark.parametrize("use", ["step", "attach", "step closure", "attach closure"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_follows_the_oracle(name: str, use: str) -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = OPTIMIZERS[name](params)
    oracle = Oracle(params, OPTIMIZERS[name])
    reg = Polarization(LAM, T)
    handle = attach(optimizer, scales, reg) if use.startswith("attach") else None
    for i in range(10):

        def closure(i: int = i) -> float:
            optimizer.zero_grad()
            assert torch.is_grad_enabled()
            set_gradients(params, i)
            return 1.5

        if use.endswith("closure"):
            if handle is None:
                assert step(optimizer, scales, reg, closure=closure) == 1.5
            elif i % 2:
                assert optimizer.step(closure) == 1.5
            else:
                assert optimizer.step(closure=closure) == 1.5
        else:
            set_gradients(params, i)
            optimizer.step() if handle else step(optimizer, scales, reg)
        oracle.step(task_gradients(params, i), LAM, T)
    assert_same(params, oracle.params, 1e-12)


def test_a_removed_handle_leaves_a_plain_optimizer() -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    with attach(optimizer, scales, Polarization(LAM, T)):
        set_gradients(params, 0)
        optimizer.step()
    handle = attach(optimizer, scales, Polarization(LAM, T))
    handle.remove()
    handle.remove()
    expected = [
        p.detach() - 0.1 * g for p, g in zip(params, task_gradients(params, 1), strict=True)
    ]
    set_gradients(params, 1)
    optimizer.step()
    assert_same(params, expected, 1e-15)
    step(optimizer, scales, Polarization(LAM, T))


def test_attached_and_scheduled() -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    attach(optimizer, scales, Polarization(LAM, T))
    for i in range(4):
        oracle.optimizer.param_groups[0]["lr"] = 0.1 * 0.5**i
        set_gradients(params, i)
        optimizer.step()
        schedule.step()
        oracle.step(task_gradients(params, i), LAM, T)
    assert_same(params, oracle.params, 1e-12)


def test_disjoint_selections_take_different_regularizers() -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    first, rest = scales.select("bn0"), scales.select("bn[1-3]")
    attach(optimizer, first, L1(0.5))
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1), l1)
    task = task_gradients(params, 0)
    weight_of = {0: 0.5, 1: 0.1, 2: 0.1, 3: 0.1}
    set_gradients(params, 0)
    step(optimizer, rest, L1(0.1))
    for i, param in enumerate(oracle.params):
        param.grad = task[i] + weight_of[i] * param.detach().sign()
    oracle.optimizer.step()
    assert_same(params, oracle.params, 1e-12)


def test_frozen_factors_count_and_do_not_move() -> None:
    for make in OPTIMIZERS.values():
        scales = make_scales(torch.float64)
        params = list(scales.values())
        optimizer, oracle = make(params), Oracle(params, make)
        set_gradients(params, 0)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step(task_gradients(params, 0), LAM, T)
        params[1].requires_grad_(False)  # its gradient stays: SGD alone would move it
        frozen = params[1].detach().clone()
        for i in range(1, 4):
            set_gradients(params, i)
            stale = params[1].grad
            step(optimizer, scales, Polarization(LAM, T))
            assert params[1].grad is stale
            before = oracle.params[1].detach().clone()
            state = copy.deepcopy(oracle.optimizer.state[oracle.params[1]])
            oracle.step(task_gradients(params, i), LAM, T)
            with torch.no_grad():
                oracle.params[1].copy_(before)
            oracle.optimizer.state[oracle.params[1]] = state
        assert torch.equal(params[1], frozen)
        assert_same(params, oracle.params, 1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [OPTIMIZERS["SGD-plain"], OPTIMIZERS["Adam-foreach"]])
def test_one_missing_gradient_is_a_zero_task_gradient(
    make: Callable[..., Optimizer], set_to_none: bool
) -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer, oracle = make(params), Oracle(params, make)
    for i in range(4):
        task = task_gradients(params, i)
        optimizer.zero_grad(set_to_none=set_to_none)
        for j, (param, grad) in enumerate(zip(params, task, strict=True)):
            if j != 2:
                param.grad = grad.clone()
        task[2].zero_()
        step(optimizer, scales, Polarization(LAM, T))
        assert params[2].grad is None
        oracle.step(task, LAM, T)
    assert_same(params, oracle.params, 1e-12)


def test_gradient_accumulation_and_clipping() -> None:
    """The subgradient comes once per step, after the clip, however many backwards there were."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    scales = ScalingFactors({"1.weight": net[1].weight})
    plain = copy.deepcopy(net)
    optimizer, other = (SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (net, plain))
    for i in range(3):
        batches = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(i)).double()
        for n, opt in ((net, optimizer), (plain, other)):
            opt.zero_grad()
            for batch in batches:
                n(batch).square().sum().backward()
            nn.utils.clip_grad_norm_(n.parameters(), 0.5)
        gamma = plain[1].weight
        (penalty,) = torch.autograd.grad(
            LAM * (T * gamma.abs() - (gamma - gamma.mean()).abs()).sum(), gamma
        )
        gamma.grad += penalty
        step(optimizer, scales, Polarization(LAM, T))
        other.step()
        gamma.data.clamp_(0, 1)
    assert_same(list(net.parameters()), list(plain.parameters()), 1e-12)


def test_groups_with_their_own_settings() -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "lr": 0.1},
            {"params": params[1:3], "weight_decay": 0.1},
            {"params": params[3:], "momentum": 0.0},
        ]

    for options in ({"maximize": False}, {"maximize": True}):
        scales = make_scales(torch.float64)
        params = list(scales.values())

        def make(params: list[Tensor], options: dict[str, Any] = options) -> Optimizer:
            return SGD(groups(params), lr=0.05, momentum=0.9, **options)

        optimizer, oracle = make(params), Oracle(params, make)
        for i in range(10):
            set_gradients(params, i)
            step(optimizer, scales, Polarization(LAM, T))
            oracle.step(task_gradients(params, i), LAM, T)
        assert_same(params, oracle.params, 1e-12)


def test_what_changes_between_steps_is_noticed() -> None:
    """λ, t, upper, layer weights, frozen γ, new groups, memory of γ, dtype."""
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = Adam(params[:3], lr=0.01)
    reg = Polarization(LAM, T)
    params[3].requires_grad_(False)
    set_gradients(params, 0)
    step(optimizer, scales, reg)
    params[3].requires_grad_(True)
    optimizer.add_param_group({"params": [params[3]]})
    reg.lam, reg.t, reg.upper = 0.5, -1.0, 0.6
    params[0].data = params[0].data.clone()
    oracle = Oracle(params, lambda p: Adam(p, lr=0.01))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"] = oracle.optimizer.state_dict()["param_groups"]
    oracle.optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="outside"):  # upper has come down
        set_gradients(params, 1)
        step(optimizer, scales, reg)
    oracle.step(task_gradients(params, 1), 0.5, -1.0, upper=0.6)
    assert_same(params, oracle.params, 1e-12)
    before = [param.detach().clone() for param in params]
    reg.weights = {"bn0.weight": 0.0, "bn1.weight": 0.0, "bn2.weight": 0.0, "bn3.weight": 3.0}
    rates = SGD(params, lr=1.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    reg.upper, reg.lam, reg.t = None, 1e-3, 0.0
    step(rates, scales, reg)
    flat, n = torch.cat(before), sum(SIZES)
    shared = 3e-3 / n * (before[3] - flat.mean()).sign().sum()
    torch.testing.assert_close(params[0].detach(), before[0] - shared)
    for param in params:
        param.data = param.data.float()
    set_gradients(params, 2)
    step(SGD(params, lr=0.1), scales, Polarization(LAM, T, upper=None))
    assert all(param.dtype == torch.float32 for param in params)


def test_all_batchnorm_weights_are_clamped_on_request() -> None:
    for upper, clamp, expected in ((1.0, "all", 1.0), (1.0, "scales", 3.0), (None, "all", 3.0)):
        scales = make_scales()
        other, frozen = nn.Parameter(torch.full((4,), 3.0)), nn.Parameter(torch.full((4,), 3.0))
        frozen.requires_grad_(False)
        scales = ScalingFactors(dict(scales), others={"stem": other, "frozen": frozen})
        params = list(scales.values())
        set_gradients(params, 0)
        reg = Polarization(LAM, T, upper=upper, clamp=clamp)
        if expected == 1.0:
            with pytest.warns(UserWarning, match=r"4 values in 1 of 6 .*stem \(4\)"):
                step(SGD(params, lr=0.1), scales, reg)
        else:
            step(SGD(params, lr=0.1), scales, reg)
        assert torch.equal(other, torch.full((4,), expected))
        assert torch.equal(frozen, torch.full((4,), 3.0))


def test_an_optimizer_that_gives_factors_other_memory() -> None:
    """As some do (`param.data = ...`): the clamp must reach the new memory."""

    class Reassigning(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                param.data = param - self.param_groups[0]["lr"] * param.grad

    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer, oracle = Reassigning(params, lr=1.0), Oracle(params, lambda p: SGD(p, lr=1.0))
    for i in range(5):
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step(task_gradients(params, i), LAM, T)
    assert_same(params, oracle.params, 1e-12)
