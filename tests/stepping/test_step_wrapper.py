"""Steps within steps, steps that raise, and the others who wrap or take `optimizer.step`."""

import copy
import gc
import pickle
import sys
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


class Run:
    """Factors that `pf.step` or an attached optimizer steps, and the oracle beside them."""

    def __init__(self, how: str, make: Any = SGD, oracle: Any = SGD) -> None:
        self.how, self.scales = how, make_scales()
        self.params: list[Tensor] = list(self.scales.values())
        self.oracle = Oracle(self.params, lambda params: oracle(params, lr=0.1))
        self.optimizer = make(self.params, lr=0.1)
        if how == "attach":
            self.handle = attach(self.optimizer, self.scales, REG)

    def step(self, *closure: Any) -> Any:
        if self.how == "step":
            return step(self.optimizer, self.scales, REG, None, *closure)
        return self.optimizer.step(*closure)

    def check(self, take: Callable[[], Any] | None = None, steps: int = 3) -> None:
        """Steps with fresh gradients are as the oracle's."""
        for i in range(steps):
            set_gradients(self.params, i)
            (take or self.step)()
            self.oracle.step(task_gradients(self.params, i), 0.02, 1.2)
            assert_same(self.params, self.oracle.params, 1e-6)

    def check_plain(self) -> None:
        """The optimizer's step is SGD's, without polarfast."""
        set_gradients(self.params, 7)
        task = task_gradients(self.params, 7)
        expected = [p.detach() - 0.1 * grad for p, grad in zip(self.params, task, strict=True)]
        self.optimizer.step()
        assert_same(self.params, expected, 1e-6)


both_ways = pytest.mark.parametrize("how", ["step", "attach"])


@both_ways
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_step_within_a_step_counts_once(base: Any, closed: bool, how: str) -> None:
    run = Run(how, nested(base), base)

    def closure() -> float:
        for param, grad in zip(run.params, given, strict=True):
            param.grad = grad
        return 3.0

    def take() -> None:
        nonlocal given
        given = [param.grad for param in run.params]
        if closed:
            run.optimizer.zero_grad()
        assert run.step(*([closure] if closed else [])) == (3.0 if closed else None)

    given: list[Any] = []
    run.check(take)


@both_ways
def test_a_compiled_step_within_a_step_counts_once(how: str) -> None:
    run = Run(how, nested(SGD))
    run.check(torch.compile(run.step, backend="eager"))


@both_ways
def test_a_step_that_calls_its_own_step_counts_once(how: str) -> None:
    class Again(SGD):
        again = True

        def step(self, closure: Any = None) -> Any:
            self.again = not self.again
            return super().step(closure) if self.again else self.step(closure)

    Run(how, Again).check()


@both_ways
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_step_that_raises_puts_gradients_back_and_the_next_is_right(where: str, how: str) -> None:
    def fail(place: str) -> None:
        if place == where:
            raise MemoryError(place)

    run = Run(how, nested(SGD))
    params = run.params
    start = [param.detach().clone() for param in params]
    params[1].requires_grad_(False)  # withheld from the optimizer: a stale gradient
    set_gradients(params, 5)
    params[2].grad = None  # filled in for the step
    stale = params[1].grad
    for _ in range(2):
        run.optimizer.fail = fail
        with pytest.raises(MemoryError, match=where):
            run.step()
        assert params[1].grad is stale and params[2].grad is None
        del run.optimizer.fail
    with torch.no_grad():
        for i, grad in enumerate(task := task_gradients(params, 5)):
            params[i].copy_(start[i])
            if i in (0, 3):
                params[i].grad = grad.float()
    run.step()
    assert params[1].grad is stale and params[2].grad is None
    run.oracle.step([*task[:2], torch.zeros(1), task[3]], 0.02, 1.2)
    run.oracle.params[1] = start[1]
    assert_same(params, run.oracle.params, 1e-6)


@both_ways
def test_a_missing_gradient_may_be_missing_again(how: str) -> None:
    run = Run(how)
    for i in range(3):
        set_gradients(run.params, i)
        task = task_gradients(run.params, i)
        run.params[2].grad, task[2] = None, torch.zeros(1)
        run.step()
        assert run.params[2].grad is None
        run.oracle.step(task, 0.02, 1.2)
        assert_same(run.params, run.oracle.params, 1e-6)


@both_ways
def test_a_step_that_is_refused_leaves_the_gradients_as_they_were(how: str) -> None:
    run = Run(how)
    run.optimizer.param_groups[0]["params"] = run.params[:2]
    run.optimizer.add_param_group({"params": run.params[2:], "maximize": True})
    set_gradients(run.params, 0)
    run.params[0].requires_grad_(False)
    run.params[2].grad = None
    given = [param.grad for param in run.params]
    with pytest.raises(StepError, match="disagree on maximize"):
        run.step()
    assert all(param.grad is grad for param, grad in zip(run.params, given, strict=True))


def unhooked() -> Any:
    """As timm's Lookahead: an Optimizer with all its parts that never calls Optimizer.__init__."""

    class Around(Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()
            self.inner, self.state, self.defaults = SGD(params, lr=lr), defaultdict(dict), {}
            self.param_groups = self.inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    return Around


@both_ways
@pytest.mark.parametrize("order", ["", "scheduler", "scheduler hooks", "hooks scheduler"])
def test_a_class_that_torch_has_put_no_hooks_on(how: str, order: str) -> None:
    def make(params: list[Tensor], lr: float) -> Any:
        optimizer = unhooked()(params, lr)
        for part in order.split():
            # zero_grad is where torch puts hooks on a class late
            ConstantLR(optimizer, 1.0) if part == "scheduler" else optimizer.zero_grad()
        return optimizer

    Run(how, make).check()


def test_hooks_that_torch_puts_on_a_class_after_the_attachment_run() -> None:
    run = Run("attach", unhooked())
    run.optimizer.zero_grad()
    seen: list[int] = []
    run.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    run.check()
    assert seen == [1, 1, 1]


@both_ways
def test_every_hook_runs_once_and_sees_the_subgradient_and_no_clamp(how: str) -> None:
    run = Run(how, lambda params, lr: SGD(params, lr=10.0))
    seen: list[str] = []

    def before(of: Optimizer, args: Any, kwargs: Any) -> None:
        task = task_gradients(run.params, 0)
        assert all((p.grad - g).abs().max() > 1e-3 for p, g in zip(run.params, task, strict=True))
        seen.append("before")

    def after(of: Optimizer, args: Any, kwargs: Any) -> None:
        assert min(param.min() for param in run.params) < 0
        seen.append("after")

    handles = [
        run.optimizer.register_step_pre_hook(before),
        run.optimizer.register_step_post_hook(after),
        register_optimizer_step_pre_hook(before),
        register_optimizer_step_post_hook(after),
    ]
    set_gradients(run.params, 0)
    run.step()
    for handle in handles:
        handle.remove()
    assert seen == ["before", "before", "after", "after"]
    assert min(param.min() for param in run.params) >= 0


def test_a_step_taken_before_the_attachment_is_refused() -> None:
    run = Run("step")
    taken = run.optimizer.step
    handle = attach(run.optimizer, run.scales, REG)
    taken_since = run.optimizer.step
    set_gradients(run.params, 0)
    before = [param.detach().clone() for param in run.params]
    with pytest.raises(StepError, match="attach before the optimizer is given"):
        taken()
    assert_same(run.params, before, 0.0)
    run.check(taken_since)
    handle.remove()
    for way in (taken, taken_since):
        run.optimizer.step = way
        run.check_plain()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("scheduled", [0, 1, 2])
@pytest.mark.filterwarnings("error")  # schedulers say where optimizer.step is not theirs
def test_handles_and_schedulers_in_any_order(scheduled: int, first: int) -> None:
    run = Run("step")
    oracle, handles, schedules = run.oracle, [], []
    for i, names in enumerate(("bn[01]", "bn[23]", None)):
        if i == scheduled:
            schedules.append(ConstantLR(run.optimizer, 1.0))
        if names:
            handles.append(attach(run.optimizer, run.scales.select(names), L1(0.3)))
    for kept in ([0, 1, 2, 3], [2, 3] if first == 0 else [0, 1]):
        set_gradients(run.params, 0)
        run.optimizer.step()
        schedules[0].step()
        for i, grad in enumerate(task_gradients(run.params, 0)):
            oracle.params[i].grad = grad + (i in kept) * 0.3 * oracle.params[i].detach().sign()
        oracle.optimizer.step()
        assert_same(run.params, oracle.params, 1e-6)
        handles.pop(first if len(handles) == 2 else 0).remove()
    later = ConstantLR(run.optimizer, 1.0)
    run.check_plain()
    later.step()


def test_attaching_over_and_over_piles_up_nothing() -> None:
    run = Run("attach")
    run.handle.remove()
    handles = [attach(run.optimizer, run.scales.select("bn[02]"), REG)]
    for i in range(sys.getrecursionlimit()):
        names = "bn[02]" if i % 2 else "bn[13]"
        handles.append(attach(run.optimizer, run.scales.select(names), REG))
        handles.pop(0).remove()
    set_gradients(run.params, 0)
    run.step()
    handles.pop().remove()
    assert "step" not in vars(run.optimizer) and not run.optimizer._optimizer_step_pre_hooks
    run.check_plain()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("end", ["taken", "skipped", "raised"])
def test_a_scaled_step_leaves_the_optimizer_as_it_was(end: str, scheduled: bool) -> None:
    run = Run("step", nested(SGD))
    if scheduled:
        ConstantLR(run.optimizer)
    found = vars(run.optimizer).get("step")

    def fail(place: str) -> None:
        raise MemoryError

    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    set_gradients(run.params, 0, torch.inf if end == "skipped" else 2.0)
    if end == "raised":
        run.optimizer.fail = fail
    with pytest.raises(MemoryError) if end == "raised" else nullcontext():
        step(run.optimizer, run.scales, REG, scaler=scaler)
    assert vars(run.optimizer).get("step") is found
    assert not run.optimizer._optimizer_step_pre_hooks


def test_an_attached_optimizer_is_freed_at_once() -> None:
    run = Run("attach")
    taken, gone = run.optimizer.step, weakref.ref(run.optimizer)
    gc.disable()  # no cycle that would have to be found
    try:
        del run.optimizer
        assert gone() is None
    finally:
        gc.enable()
    run.handle.remove()
    with pytest.raises(ReferenceError, match="is gone"):
        taken()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_an_attached_optimizer_is_plain(copied: Callable[[Any], Any]) -> None:
    run = Run("attach")
    before, original = [param.detach().clone() for param in run.params], run.params
    run.optimizer = copied(run.optimizer)
    run.params = run.optimizer.param_groups[0]["params"]
    run.check_plain()
    assert_same(original, before, 0.0)
