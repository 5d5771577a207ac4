"""Threads in the middle of a step: those who look change nothing, those who step are refused."""

import importlib
import threading
import time

import pytest
import torch
from support.backends import BACKENDS, bits, kind_of
from torch import nn

import polarfast as pf
from polarfast.errors import StepError
from polarfast.planning.thresholds import magnitudes, valleys
from polarfast.stepping import binding
from polarfast.stepping import step as step_module

SGD = importlib.import_module("torch.optim.sgd")
X = torch.zeros(2, 3, 4, 4)


def network() -> tuple[nn.Module, pf.ScalingFactors]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1))
    model.extend([nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)])
    scales = pf.scaling_factors(model, X)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(0.1, 0.9)
    for param in model.parameters():
        param.grad = torch.rand_like(param)
    return model, scales


def in_thread(work):
    """What `work()` returned or raised, in a thread of its own."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def amid(monkeypatch):
    """amid(work): `work()` runs once, in a thread, while SGD steps the parameters that are no γ."""
    inner, found = SGD.sgd, []

    def plan(work):
        left = [work]

        def sgd(*args, **kwargs):
            if left:
                found.append(in_thread(left.pop()))
            inner(*args, **kwargs)

        monkeypatch.setattr(SGD, "sgd", sgd)
        return found

    return plan


def three_steps(optimizer, scales, reg):
    for _ in range(3):
        pf.step(optimizer, scales, reg)
    return [bits(gamma) for gamma in scales.values()]


READERS = {
    "valley": lambda model, scales, reg: pf.thresholds(scales),
    "fixed": lambda model, scales, reg: pf.thresholds(scales, "fixed"),
    "percentile": lambda model, scales, reg: pf.thresholds(scales, "percentile", 0.3),
    "valleys": lambda model, scales, reg: valleys(scales),
    "magnitudes": lambda model, scales, reg: magnitudes(scales),
    "value": lambda model, scales, reg: reg.value(scales),
    "repr": lambda model, scales, reg: repr(scales) + repr(reg),
    "cut": lambda model, scales, reg: reg.predictor.cut(),
    "look": lambda model, scales, reg: reg.predictor.look(),
    "state": lambda model, scales, reg: (reg.live, reg.state_dict()),
    "plan": lambda model, scales, reg: pf.plan(model, X, scales),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_reader_in_the_middle_of_a_step_changes_nothing(
    reader, backend, momentum, amid, monkeypatch
):
    monkeypatch.setattr("polarfast.kernels.table_type", lambda device: kind_of(backend))
    ends, seen = [], None
    for read in (None, READERS[reader]):
        model, scales = network()
        reg = pf.FlopsTarget(model, X, scales, cut=0.4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
        before = [bits(gamma) for gamma in scales.values()]
        if read is not None:
            seen = amid(lambda read=read, args=(model, scales, reg): read(*args))
        ends.append(three_steps(optimizer, scales, reg))
        assert all(a != b for a, b in zip(ends[-1], before, strict=True))
    assert ends[0] == ends[1]
    assert seen and not isinstance(seen[0], Exception)


def test_other_layer_weights_in_the_middle_of_a_step_are_for_the_next(amid):
    ends = []
    for change in (False, True):
        model, scales = network()
        reg = pf.Polarization(lam=0.01, t=1.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if change:
            amid(lambda reg=reg, scales=scales: setattr(reg, "weights", dict.fromkeys(scales, 2.0)))
        pf.step(optimizer, scales, reg)
        ends.append([bits(gamma) for gamma in scales.values()])
    assert ends[0] == ends[1]


def test_two_threads_that_are_first_share_what_is_kept_of_the_factors(monkeypatch):
    """One is in the middle of making it when the other asks."""
    _, scales = network()
    inside, check = threading.Event(), binding._check_sizes

    def slowly(scales):
        inside.set()
        time.sleep(0.05)
        check(scales)

    monkeypatch.setattr(binding, "_check_sizes", slowly)
    found = []
    thread = threading.Thread(target=lambda: found.append(binding.Binding.of(scales)))
    thread.start()
    inside.wait()
    mine = binding.Binding.of(scales)
    thread.join()
    assert found[0] is mine


def stepping(kind, model, optimizer, scales, reg):
    if kind == "the same":
        return lambda: pf.step(optimizer, scales, reg)
    if kind == "some of them":
        return lambda: pf.step(optimizer, scales.select("1.weight"), reg)
    others = pf.scaling_factors(model, X)
    second = torch.optim.Adam(model.parameters(), lr=0.1)
    if kind == "another optimizer":
        return lambda: pf.step(second, others, reg)
    pf.attach(second, others, reg)
    return lambda: second.step()


@pytest.mark.parametrize("kind", ["the same", "some of them", "another optimizer", "attached"])
def test_a_step_in_the_middle_of_a_step_on_the_same_factors_is_refused(kind, amid):
    ends = []
    for beside in (False, True):
        model, scales = network()
        reg = pf.Polarization(lam=0.01, t=1.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if beside:
            found = amid(stepping(kind, model, optimizer, scales, reg))
        ends.append(three_steps(optimizer, scales, reg))
        assert all(param.grad is not None for param in scales.values())
    assert ends[0] == ends[1]
    with pytest.raises(StepError, match=r"step on '1.weight' is on its way, in another thread"):
        raise found[0]


def test_an_attached_optimizer_is_not_stepped_by_two_threads_at_once():
    """Nor does the second get a plain step, as a step within a step of the same thread does."""
    model, scales = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pf.attach(optimizer, scales, pf.Polarization(lam=0.01, t=1.2))
    found = []

    def closure():
        found.append(in_thread(optimizer.step))
        return torch.zeros(())

    optimizer.step(closure)
    with pytest.raises(StepError, match="in another thread"):
        raise found[0]
    optimizer.step()  # and afterwards all is as before


def test_two_networks_are_stepped_at_once(amid):
    models = [network() for _ in range(3)]
    reg = pf.Polarization(lam=0.01, t=1.2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model, _ in models]
    seen = amid(lambda: pf.step(optimizers[1], models[1][1], reg))
    pf.step(optimizers[0], models[0][1], reg)
    assert seen == [None]
    pf.step(optimizers[2], models[2][1], reg)
    alone = [bits(gamma) for gamma in models[2][1].values()]
    for _, scales in models[:2]:
        assert [bits(gamma) for gamma in scales.values()] == alone


def test_after_a_step_that_failed_the_factors_are_free():
    model, scales = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pf.step(optimizer, scales, pf.L1(0.1), closure=closure)
    assert in_thread(lambda: pf.step(optimizer, scales, pf.L1(0.1))) is None


def test_an_interrupt_while_a_step_begins_leaves_the_factors_free(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    scales = pf.scaling_factors(model, torch.rand(2, 3, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = pf.Polarization(1e-3, 1.2)
    model(torch.rand(2, 3, 4, 4)).sum().backward()
    claim = step_module._Work.claim

    def interrupted(self):
        claim(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(step_module._Work, "claim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pf.step(optimizer, scales, reg)
    attached = pf.attach(optimizer, scales, reg)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    attached.remove()
    monkeypatch.undo()
    pf.step(optimizer, scales, reg)
