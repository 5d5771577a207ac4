"""Steps within steps, steps that raise, and the others who wrap or take `optimizer.step`."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.stepping import Oracle, assert_same, make_scales, set_gradients, task_gradients
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from polarfast.errors import StepError
from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import L1, Polarization
from polarfast.stepping.step import attach, step

REG = Polarization(0.02, 1.2)


def nested(base: type[Optimizer]) -> type[Optimizer]:
    """A class whose step calls that of a class which has step hooks of its own by now."""
    base([torch.zeros(1, requires_grad=True)], lr=0.1)  # type: ignore[call-arg]

    class Middle(base):  # type: ignore[valid-type, misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    Middle([torch.zeros(1, requires_grad=True)], lr=0.1)

    class Outer(Middle):
        fail: Callable[[str], None] = staticmethod(lambda where: None)

        def step(self, closure: Any = None) -> Any:
            self.fail("before")
            result = super().step(closure)
            self.fail("after")
            return result

    return Outer


class Steps:
    """Steps by `pf.step` or with an attached optimizer."""

    def __init__(self, how: str, optimizer: Optimizer, scales: ScalingFactors) -> None:
        self.how, self.optimizer, self.scales = how, optimizer, scales
        if how == "attach":
            attach(optimizer, scales, REG)

    def __call__(self, closure: Any = None) -> Any:
        if self.how == "step":
            return step(self.optimizer, self.scales, REG, closure=closure)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)


@pytest.mark.parametrize("how", ["step", "attach"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_step_within_a_step_counts_once(base: Any, closed: bool, how: str) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    oracle = Oracle(params, lambda p: base(p, lr=0.1))
    take = Steps(how, nested(base)(params, lr=0.1), scales)  # type: ignore[call-arg]
    for i in range(3):

        def closure(i: int = i) -> float:
            set_gradients(params, i)
            return 3.0

        if not closed:
            closure()
        assert take(closure if closed else None) == (3.0 if closed else None)
        oracle.step(task_gradients(params, i), 0.02, 1.2)
        for param, expected in zip(params, oracle.params, strict=True):
            torch.testing.assert_close(param.double(), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["step", "attach"])
def test_a_compiled_step_within_a_step_counts_once(how: str) -> None:
    found = []
    for compiled in (False, True):
        scales = make_scales()
        params: list[Tensor] = list(scales.values())
        take: Any = Steps(how, nested(SGD)(params, lr=0.1), scales)  # type: ignore[call-arg]
        if compiled:
            take = torch.compile(take.__call__, backend="eager")
        for i in range(3):
            set_gradients(params, i)
            take()
        found.append(params)
    for eager, param in zip(*found, strict=True):
        torch.testing.assert_close(param, eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["step", "attach"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_the_step_after_one_that_raised_is_right(where: str, how: str) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    params[1].requires_grad_(False)  # withheld from the optimizer: a stale gradient
    optimizer: Any = nested(SGD)(params, lr=0.1)  # type: ignore[call-arg]
    take = Steps(how, optimizer, scales)

    def fail(place: str) -> None:
        if place == where:
            raise MemoryError(place)

    for _ in range(2):
        set_gradients(params, 0)
        stale = params[1].grad
        params[2].grad = None  # filled in for the step
        optimizer.fail = fail
        with pytest.raises(MemoryError, match=where):
            take()
        assert params[1].grad is stale and params[2].grad is None
        del optimizer.fail
        with torch.no_grad():
            for param, fresh in zip(params, make_scales().values(), strict=True):
                param.copy_(fresh)
    for i in (0, 3):  # the same gradients set anew
        params[i].grad = task_gradients(params, 5)[i].float()
    start = [param.detach().clone() for param in params]
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    task = task_gradients(params, 5)
    task[2] = torch.zeros_like(task[2])
    oracle.step(task, 0.02, 1.2)
    take()
    for i in (0, 2, 3):
        torch.testing.assert_close(params[i].double(), oracle.params[i].detach(), rtol=0, atol=1e-6)
        assert not torch.equal(params[i], start[i])
    assert torch.equal(params[1], start[1]) and params[1].grad is stale
    assert params[2].grad is None


def test_a_gradient_made_after_a_step_that_raised_is_kept() -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer: Any = nested(SGD)(params, lr=0.1)  # type: ignore[call-arg]
    take = Steps("attach", optimizer, scales)
    set_gradients(params, 0)
    params[2].grad = None

    def fail(place: str) -> None:
        raise MemoryError

    optimizer.fail = fail
    with pytest.raises(MemoryError):
        take()
    del optimizer.fail
    before = params[2].item()
    (1000 * params[2]).sum().backward()  # accumulates into what was filled in
    take()
    assert params[2].grad is not None and before > 0 and params[2].item() == 0


@pytest.mark.parametrize("how", ["step", "attach"])
def test_a_missing_gradient_may_be_missing_again(how: str) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    take = Steps(how, SGD(params, lr=0.1), scales)
    for i in range(3):
        set_gradients(params, i)
        gradients = task_gradients(params, i)
        params[2].grad, gradients[2] = None, torch.zeros_like(params[2])
        take()
        assert params[2].grad is None
        oracle.step(gradients, 0.02, 1.2)
        assert_same(params, oracle.params, 1e-6)


def test_a_step_that_is_refused_leaves_the_gradients_as_they_were() -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    groups = [{"params": params[:2]}, {"params": params[2:], "maximize": True}]
    optimizer = SGD(groups, lr=0.1)
    set_gradients(params, 0)
    params[0].requires_grad_(False)
    params[2].grad = None
    given = [param.grad for param in params]
    attach(optimizer, scales, REG)
    with pytest.raises(StepError, match="disagree on maximize"):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, given, strict=True))


def unhooked() -> Any:
    """As timm's Lookahead: an Optimizer with all its parts that never calls Optimizer.__init__."""

    class Around(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()
            self.inner, self.param_groups, self.defaults = inner, inner.param_groups, {}
            self.state = defaultdict(dict)

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    return Around


@pytest.mark.parametrize("how", ["step", "attach"])
def test_a_class_that_torch_never_put_hooks_on(how: str) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    take = Steps(how, unhooked()(SGD(params, lr=0.1)), scales)
    set_gradients(params, 0)
    take()
    oracle.step(task_gradients(params, 0), 0.02, 1.2)
    for param, expected in zip(params, oracle.params, strict=True):
        torch.testing.assert_close(param.double(), expected.detach(), rtol=0, atol=1e-6)


def assert_plain(optimizer: Optimizer, params: list[Tensor], seed: int = 7) -> None:
    """SGD at lr=0.1 takes the step that it takes without polarfast."""
    set_gradients(params, seed)
    task = task_gradients(params, seed)
    expected = [param.detach() - 0.1 * grad for param, grad in zip(params, task, strict=True)]
    optimizer.step()
    assert_same(params, expected, 1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["step", "attach"])
def test_a_step_that_a_scheduler_took_before_torch_put_hooks_on_it(how: str, late: bool) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    optimizer = unhooked()(SGD(params, lr=0.1))
    ConstantLR(optimizer, factor=1.0)
    if late:
        optimizer.zero_grad()  # here torch does
    set_gradients(params, 0)
    Steps(how, optimizer, scales)()
    oracle.step(task_gradients(params, 0), 0.02, 1.2)
    assert_same(params, oracle.params, 1e-6)


def test_hooks_that_torch_puts_on_a_class_after_the_attachment_run() -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer = unhooked()(SGD(params, lr=0.1))
    attach(optimizer, scales, REG)
    optimizer.zero_grad()  # here torch does
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    set_gradients(params, 0)
    optimizer.step()
    assert seen == [1]


@pytest.mark.parametrize("how", ["step", "attach"])
def test_a_step_that_calls_its_own_step_counts_once(how: str) -> None:
    class Again(SGD):
        again = True

        def step(self, closure: Any = None) -> Any:
            if self.again:
                self.again = False
                return self.step(closure)
            self.again = True
            return super().step(closure)

    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    take = Steps(how, Again(params, lr=0.1), scales)
    for i in range(3):
        set_gradients(params, i)
        take()
        oracle.step(task_gradients(params, i), 0.02, 1.2)
    assert_same(params, oracle.params, 1e-6)


@pytest.mark.parametrize("how", ["step", "attach"])
def test_every_hook_runs_once_and_sees_the_subgradient_and_no_clamp(how: str) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer = SGD(params, lr=10.0)
    seen: list[str] = []

    def before(of: Optimizer, args: Any, kwargs: Any) -> None:
        task = task_gradients(params, 0)
        assert not any(torch.equal(p.grad, g.float()) for p, g in zip(params, task, strict=True))
        seen.append("before")

    def after(of: Optimizer, args: Any, kwargs: Any) -> None:
        assert min(param.min() for param in params) < 0
        seen.append("after")

    take = Steps(how, optimizer, scales)
    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]
    set_gradients(params, 0)
    take()
    for handle in handles:
        handle.remove()
    assert seen == ["before", "before", "after", "after"]
    assert min(param.min() for param in params) >= 0


def test_a_step_taken_before_the_attachment_is_refused() -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    taken = optimizer.step
    handle = attach(optimizer, scales, REG)
    taken_since = optimizer.step
    set_gradients(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(StepError, match="attach before the optimizer is given"):
        taken()
    assert_same(params, before, 0.0)
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    for i, way in enumerate((taken_since, optimizer.step)):
        set_gradients(params, i)
        way()
        oracle.step(task_gradients(params, i), 0.02, 1.2)
    assert_same(params, oracle.params, 1e-6)
    handle.remove()
    for way in (taken, taken_since):
        optimizer.step = way  # type: ignore[method-assign]
        assert_plain(optimizer, params)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("scheduled", ["before", "between", "after"])
def test_handles_and_schedulers_in_any_order(scheduled: str, first: int) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    schedules, handles = [], []

    def schedule(when: str) -> None:
        if when == scheduled:
            schedules.append(ConstantLR(optimizer, factor=1.0))

    schedule("before")
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # schedulers say where optimizer.step is not theirs
        handles.append(attach(optimizer, scales.select("bn[01]"), L1(0.3)))
        schedule("between")
        handles.append(attach(optimizer, scales.select("bn[23]"), L1(0.3)))
        schedule("after")
        set_gradients(params, 0)
        optimizer.step()
        schedules[0].step()
        for param, grad in zip(oracle.params, task_gradients(params, 0), strict=True):
            param.grad = grad + 0.3 * param.detach().sign()
        oracle.optimizer.step()
        assert_same(params, oracle.params, 1e-6)
        handles.pop(first).remove()
        kept = [2, 3] if first == 0 else [0, 1]
        set_gradients(params, 1)
        optimizer.step()
        for i, grad in enumerate(task_gradients(params, 1)):
            oracle.params[i].grad = grad + (i in kept) * 0.3 * oracle.params[i].detach().sign()
        oracle.optimizer.step()
        assert_same(params, oracle.params, 1e-6)
        handles.pop().remove()
        schedules.append(ConstantLR(optimizer, factor=1.0))
        assert_plain(optimizer, params)
        schedules[1].step()


def test_attaching_over_and_over_piles_up_nothing() -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    even, odd = scales.select("bn[02]"), scales.select("bn[13]")
    handles = [attach(optimizer, even, REG)]
    for i in range(sys.getrecursionlimit()):
        handles.append(attach(optimizer, even if i % 2 else odd, REG))
        handles.pop(0).remove()
    set_gradients(params, 0)
    optimizer.step()
    handles.pop().remove()
    assert "step" not in vars(optimizer) and not optimizer._optimizer_step_pre_hooks
    assert_plain(optimizer, params)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("end", ["taken", "skipped", "raised"])
def test_a_scaled_step_leaves_the_optimizer_as_it_was(end: str, scheduled: bool) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer: Any = nested(SGD)(params, lr=0.1)  # type: ignore[call-arg]
    if scheduled:
        ConstantLR(optimizer, factor=1.0)
    found = vars(optimizer).get("step")

    def fail(place: str) -> None:
        raise MemoryError

    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    set_gradients(params, 0, 2.0)
    if end == "skipped":
        params[0].grad = torch.full_like(params[0], torch.inf)
    if end == "raised":
        optimizer.fail = fail
    with pytest.raises(MemoryError) if end == "raised" else nullcontext():
        step(optimizer, scales, REG, scaler=scaler)
    assert vars(optimizer).get("step") is found and not optimizer._optimizer_step_pre_hooks


def test_an_attached_optimizer_is_freed_at_once() -> None:
    scales = make_scales()
    optimizer = SGD(scales.values(), lr=0.1)
    handle = attach(optimizer, scales, REG)
    taken, gone = optimizer.step, weakref.ref(optimizer)
    gc.disable()  # no cycle that would have to be found
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    handle.remove()
    with pytest.raises(ReferenceError, match="is gone"):
        taken()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_an_attached_optimizer_is_plain(copied: Callable[[Any], Any]) -> None:
    scales = make_scales()
    optimizer = SGD(scales.values(), lr=0.1)
    attach(optimizer, scales, REG)
    before = [param.detach().clone() for param in scales.values()]
    other = copied(optimizer)
    assert_plain(other, other.param_groups[0]["params"])
    assert_same(scales, before, 0.0)


def test_a_step_that_raised_keeps_no_variables_alive() -> None:
    scales = make_scales()
    params = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    attach(optimizer, scales, REG)

    def failing() -> None:
        raise KeyError("in a closure")

    def train() -> "weakref.ref[Tensor]":
        big = torch.zeros(1000)
        with pytest.raises(KeyError):
            optimizer.step(failing)  # type: ignore[arg-type]
        return weakref.ref(big)

    seen = train()
    gc.collect()
    assert seen() is None
