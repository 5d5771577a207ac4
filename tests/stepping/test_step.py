"""pf.step with SGD: against plain SGD with float64 autograd of Eq. 2."""

import copy
import warnings
from typing import Any

import pytest
import torch
from support.stepping import (
    Oracle,
    assert_same,
    make_scales,
    set_gradients,
    task_gradients,
    tolerance,
)
from torch import nn
from torch.optim import SGD, Optimizer

from polarfast.kernels import ScaleTable
from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import Polarization
from polarfast.stepping.step import step

LAM, T = 0.02, 1.2

SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.01},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.01},
    {"maximize": True},
]
IMPLEMENTATIONS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]


class UnfusedSGD(SGD):
    """A subclass may do anything in step(), so polarfast leaves its γ to it."""


def _ids(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=_ids)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=_ids)
@pytest.mark.parametrize("kind", [SGD, UnfusedSGD])
def test_hundred_steps_equal_plain_sgd(
    kind: type[SGD], options: dict[str, Any], implementation: dict[str, Any]
) -> None:
    scales = make_scales(torch.float64)
    optimizer = kind(scales.values(), lr=0.05, **options, **implementation)
    oracle = Oracle(list(scales.values()), lambda params: SGD(params, lr=0.05, **options))
    params = list(scales.values())
    for i in range(100):
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step(task_gradients(params, i), LAM, T)
    assert_same(params, oracle.params, 1e-12)
    _assert_same_state(optimizer, oracle.optimizer, 1e-12)


def _assert_same_state(optimizer: Optimizer, plain: Optimizer, tol: float) -> None:
    mine, theirs = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for key, entry in theirs.items():
        assert mine[key].keys() == entry.keys()
        for name, value in entry.items():
            torch.testing.assert_close(mine[key][name].double(), value, rtol=0, atol=tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [SGD, UnfusedSGD])
def test_low_precision_follows_the_float64_run(kind: type[SGD], dtype: torch.dtype) -> None:
    scales = make_scales(dtype)
    params = list(scales.values())
    optimizer = kind(params, lr=0.05, momentum=0.9, weight_decay=0.01)
    oracle = Oracle(params, lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01))
    for i in range(20):
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step([g.to(dtype).double() for g in task_gradients(params, i)], LAM, T)
    assert all(param.dtype == dtype for param in params)
    assert_same(params, oracle.params, tolerance(dtype))


@pytest.mark.parametrize(("kind", "fused"), [(SGD, True), (UnfusedSGD, False)])
def test_one_kernel_call_steps_all_factors_of_sgd(
    kind: type[SGD], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("sgd_step_", "add_subgradient_", "clamp_"):
        original = getattr(ScaleTable, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ScaleTable, name, spy)
    scales = make_scales()
    set_gradients(list(scales.values()), 0)
    step(kind(scales.values(), lr=0.1), scales, Polarization(LAM, T))
    assert calls == (["sgd_step_"] if fused else ["add_subgradient_", "clamp_"])


def test_other_parameters_take_the_step_they_would_take_anyway() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    plain = copy.deepcopy(model)
    scales = ScalingFactors({"1.weight": model[1].weight})
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer, other = SGD(model.parameters(), **options), SGD(plain.parameters(), **options)
    for i in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        for net, opt in ((model, optimizer), (plain, other)):
            opt.zero_grad()
            net(x).square().mean().backward()
        with torch.no_grad():  # the same γ in both, so that the others see the same gradients
            step(optimizer, scales, Polarization(0.0, T, upper=None))
            other.step()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name == "1.weight":
            torch.testing.assert_close(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_dicts_interchange_with_a_plain_run(momentum: float) -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = SGD(params, lr=0.05, momentum=momentum)
    oracle = Oracle(params, lambda p: SGD(p, lr=0.05, momentum=momentum))
    for i in range(5):
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step(task_gradients(params, i), LAM, T)
    swapped = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(oracle.optimizer.state_dict())
    oracle.optimizer.load_state_dict(swapped)
    assert optimizer.state_dict()["param_groups"] == oracle.optimizer.state_dict()["param_groups"]
    for i in range(5, 10):
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step(task_gradients(params, i), LAM, T)
    assert_same(params, oracle.params, 1e-12)


def test_a_state_that_misses_some_buffers_is_completed_as_sgd_does() -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    optimizer = SGD(params, **options)
    oracle = Oracle(params, lambda p: SGD(p, **options))
    for i in range(3):
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        oracle.step(task_gradients(params, i), LAM, T)
        if i == 0:
            optimizer.state[params[1]].clear()
            oracle.optimizer.state[oracle.params[1]].clear()
    assert_same(params, oracle.params, 1e-12)


def test_every_use_of_the_fused_path_has_its_fallback() -> None:
    """What makes SGD fall back: γ in groups that differ, a tensor lr, hooks, a patched step."""
    seen: list[str] = []

    def run(variant: str) -> list[torch.Tensor]:
        scales = make_scales(torch.float64)
        params = list(scales.values())
        lr: Any = torch.tensor(0.05, dtype=torch.float64) if variant == "tensor lr" else 0.05
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
        if variant == "two settings":
            groups[1]["foreach"] = False
            groups[1]["weight_decay"] = 0.0
            groups[0]["weight_decay"] = 1e-300
        optimizer = SGD(groups, lr=lr, momentum=0.9)
        if variant == "hook":
            optimizer.register_step_pre_hook(
                lambda opt, args, kwargs: seen.append(f"{sum(p.grad is not None for p in params)}")
            )
        if variant == "patched":
            original = optimizer.step
            optimizer.step = lambda *args: (  # type: ignore[method-assign]
                seen.append(f"{sum(p.grad is not None for p in params)}"),
                original(*args),
            )[1]
        for i in range(5):
            set_gradients(params, i)
            step(optimizer, scales, Polarization(LAM, T))
        return params

    reference = run("fused")
    for variant in ("two settings", "tensor lr", "hook", "patched"):
        assert_same(run(variant), reference, 1e-12)
    assert seen == ["4"] * 10, "hooks and patches see every gradient"


def test_a_learning_rate_scheduler_keeps_working() -> None:
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1, momentum=0.9))
    for i in range(6):
        oracle.optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** (i // 2)
        set_gradients(params, i)
        step(optimizer, scales, Polarization(LAM, T))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            schedule.step()
        oracle.step(task_gradients(params, i), LAM, T)
    assert_same(params, oracle.params, 1e-12)


def test_gradients_are_put_back_even_when_the_optimizer_fails() -> None:
    scales = make_scales()
    params = list(scales.values())
    stray = nn.Parameter(torch.zeros(3))
    optimizer = SGD([*params, stray], lr=0.1)
    set_gradients(params, 0)
    stray.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    optimizer.param_groups[0]["fused"] = True  # refuses sparse gradients
    optimizer.param_groups[0]["foreach"] = False
    grads, before = [p.grad for p in params], [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="sparse"):
        step(optimizer, scales, Polarization(LAM, T))
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert_same(params, before, 0.0)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_task_gradients_survive_the_fused_step() -> None:
    scales = make_scales()
    params = list(scales.values())
    set_gradients(params, 0)
    grads = [p.grad for p in params]
    values = [g.clone() for g in grads if g is not None]
    step(SGD(params, lr=0.1, momentum=0.9), scales, Polarization(LAM, T))
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert_same([p.grad for p in params if p.grad is not None], values, 0.0)
