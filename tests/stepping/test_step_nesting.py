"""Step hooks that torch runs twice in a step, in a step that raises, or not at all."""

import gc
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stepping import Oracle, assert_same, make_scales, set_gradients, task_gradients
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from polarfast.errors import StepError
from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.nesting import Nesting
from polarfast.stepping.regularizers import Polarization
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


def test_nesting_sees_calls_that_ended_without_a_word() -> None:
    nesting = Nesting()
    seen: list[tuple[bool, bool | None]] = []

    def call(depth: int, fails_at: int, swallows_at: int = -1) -> None:
        """As an optimizer's step: hook, work, hook."""
        first = nested_enter()
        try:
            if depth == fails_at:
                raise KeyError
            if depth:
                call(depth - 1, fails_at, swallows_at)
        except KeyError:
            if depth != swallows_at:
                seen.append((first, None))
                raise
        seen.append((first, nested_leave()))

    def nested_enter() -> bool:
        return nesting.enter()

    def nested_leave() -> bool:
        return nesting.leave()

    whole = [(False, False), (False, False), (True, True)]
    call(2, -1)
    assert seen == whole
    for fails_at in (0, 1, 2):
        seen.clear()
        with pytest.raises(KeyError):
            call(2, fails_at)
        seen.clear()
        call(2, -1)
        assert seen == whole
    seen.clear()
    call(2, 0, swallows_at=1)
    assert seen == [(False, None), (False, False), (True, True)]


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


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["step", "attach"])
def test_a_step_that_a_scheduler_took_before_it_had_hooks(how: str, late: bool) -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer = unhooked()(SGD(params, lr=0.1))
    ConstantLR(optimizer)
    if late:
        optimizer.zero_grad()
    set_gradients(params, 0)
    with pytest.raises(StepError, match=r"zero_grad\(\) once before making the scheduler"):
        Steps(how, optimizer, scales)()
    again = unhooked()(SGD(params, lr=0.1))
    again.zero_grad()
    ConstantLR(again)
    set_gradients(params, 0)
    before = params[3].detach().clone()
    Steps(how, again, scales)()
    assert not torch.equal(params[3], before)


def test_a_step_without_its_hooks_is_told() -> None:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    optimizer: Any = SGD(params, lr=0.1)
    optimizer.step = lambda closure=None: None
    set_gradients(params, 0)
    with pytest.raises(StepError, match="ran without its step hooks"):
        step(optimizer, scales, REG)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_step_that_raised_keeps_no_variables_alive(levels: int) -> None:
    scales = make_scales()
    params = list(scales.values())
    make = nested(SGD) if levels == 2 else SGD
    optimizer = make(params, lr=0.1)  # type: ignore[call-arg]
    attach(optimizer, scales, REG)

    def failing() -> None:
        raise KeyError("in a closure")

    def train() -> "weakref.ref[Tensor]":
        big = torch.zeros(1000)
        set_gradients(params, 0)
        with pytest.raises(KeyError):
            optimizer.step(failing)  # type: ignore[arg-type]
        return weakref.ref(big)

    seen = train()
    gc.collect()
    assert seen() is None


def test_a_frame_in_the_place_of_one_that_ended_is_another() -> None:
    nesting = Nesting()
    ids = set()

    def enter() -> bool:
        return nesting.enter()

    def failing() -> None:
        ids.add(id(sys._getframe()))
        assert enter()  # the outermost each time, wherever its frame lies
        raise KeyError

    def outer() -> None:
        sys._getframe()
        with pytest.raises(KeyError):
            failing()

    for _ in range(50):
        with pytest.raises(KeyError):
            failing()
        outer()
    assert len(ids) < 100  # addresses do come again
