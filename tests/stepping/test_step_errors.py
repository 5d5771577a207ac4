"""Steps that cannot be taken say so, name the factor, and move nothing."""

import subprocess
import sys
import warnings

import pytest
import torch
from support.stepping import make_scales, set_gradients
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

from polarfast.errors import ArgumentError, PolarfastError, ScalingFactorError, StepError
from polarfast.scaling.factors import ScalingFactors, scaling_factors
from polarfast.scaling.gating import add_gates
from polarfast.stepping.regularizers import L1, Polarization
from polarfast.stepping.step import attach, step

REG = Polarization(0.02, 1.2)


def _case() -> tuple[ScalingFactors, list[Tensor], SGD]:
    scales = make_scales()
    params: list[Tensor] = list(scales.values())
    return scales, params, SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("attached", [False, True])
def test_step_before_backward(attached: bool) -> None:
    scales, params, optimizer = _case()
    before = [param.detach().clone() for param in params]
    if attached:
        attach(optimizer, scales, REG)
    with pytest.raises(StepError, match=r"no scaling factor .*'bn0.weight'.*call backward\(\)"):
        optimizer.step() if attached else step(optimizer, scales, REG)
    with pytest.raises(StepError, match="call backward"):  # a closure without a backward
        if attached:
            optimizer.step(lambda: None)  # type: ignore[arg-type, return-value]
        else:
            step(optimizer, scales, REG, closure=lambda: None)
    assert all(map(torch.equal, params, before))
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("attached", [False, True])
def test_gates_that_a_conversion_dropped(attached: bool, made: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )
    add_gates(net, x)
    scales = scaling_factors(net, x)
    given = list(net.parameters())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert [name for name in scales] == ["1.gate"]
    assert "1.gate" not in dict(model.named_parameters())
    optimizer = SGD(given if made == "before" else model.parameters(), lr=0.1)
    for param in model.parameters():  # SyncBatchNorm itself runs on a GPU only
        param.grad = torch.ones_like(param)
    if attached:
        attach(optimizer, scales, REG)
    with pytest.raises(PolarfastError, match="convert_sync_batchnorm does: convert first"):
        optimizer.step() if attached else step(optimizer, scales, REG)


@pytest.mark.parametrize("attached", [False, True])
def test_all_factors_frozen(attached: bool) -> None:
    scales, params, optimizer = _case()
    set_gradients(params, 0)
    for param in params:
        param.requires_grad_(False)
    if attached:
        attach(optimizer, scales, REG)
    with pytest.raises(StepError, match="all 4 scaling factors are frozen"):
        optimizer.step() if attached else step(optimizer, scales, REG)


@pytest.mark.parametrize("attached", [False, True])
def test_a_trainable_factor_outside_the_optimizer(attached: bool) -> None:
    scales, params, _ = _case()
    optimizer = SGD([params[0], params[2]], lr=0.1)
    set_gradients(params, 0)
    params[1].requires_grad_(False)  # a frozen one need not be there
    if attached:
        attach(optimizer, scales, REG)
    with pytest.raises(ScalingFactorError, match="'bn3.weight' .*in no parameter group"):
        optimizer.step() if attached else step(optimizer, scales, REG)
    params[3].requires_grad_(False)
    optimizer.step() if attached else step(optimizer, scales, REG)


def test_groups_that_disagree_on_maximize() -> None:
    scales, params, _ = _case()
    groups = [{"params": params[:2]}, {"params": params[2:], "maximize": True}]
    set_gradients(params, 0)
    before = [param.detach().clone() for param in params]
    for kind in (SGD, Adam):
        with pytest.raises(StepError, match="disagree on maximize"):
            step(kind(groups, lr=0.1), scales, REG)
    assert all(map(torch.equal, params, before))


def test_nothing_is_added_twice() -> None:
    scales, params, optimizer = _case()
    set_gradients(params, 0)
    handle = attach(optimizer, scales, REG)
    for again in (scales, scales.select("bn2")):
        with pytest.raises(StepError, match="attached to this optimizer already"):
            attach(optimizer, again, REG)
        with pytest.raises(StepError, match=r"call optimizer.step\(\) alone"):
            step(optimizer, again, REG)
    attach(SGD(params, lr=0.1), scales, REG)  # another optimizer is another matter
    handle.remove()
    step(optimizer, scales, REG)
    attach(optimizer, scales, REG)


def test_optimizers_that_cannot_be_served() -> None:
    scales, params, inner = _case()

    class Wrapper(torch.optim.Optimizer):
        """As trainers have them: an Optimizer by type, with none of its parts."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    for use in (step, attach):
        with pytest.raises(ArgumentError, match="pass the torch.optim.Optimizer that it wraps"):
            use(Wrapper(inner), scales, REG)
        with pytest.raises(ArgumentError, match="optimizer is a list"):
            use(params, scales, REG)  # type: ignore[arg-type]
        with pytest.raises(StepError, match="LBFGS searches along lines"):
            use(LBFGS(params), scales, REG)


def test_unusable_gradients_are_named() -> None:
    scales, params, optimizer = _case()
    set_gradients(params, 0)
    params[1].grad = torch.zeros(32)[::2]
    with pytest.raises(ScalingFactorError, match="bn1.weight"):
        step(optimizer, scales, REG)
    mixed = ScalingFactors(
        {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2).double())}
    )
    for param in mixed.values():
        param.grad = torch.ones_like(param)
    with pytest.raises(PolarfastError, match="b is torch.float64"):
        step(SGD(mixed.values(), lr=0.1), mixed, REG)


def test_weights_for_an_unknown_layer() -> None:
    scales, params, optimizer = _case()
    set_gradients(params, 0)
    with pytest.raises(ArgumentError, match=r"weights\['bn9.weight'\]: no such scaling factor"):
        step(optimizer, scales, L1(0.1, weights={"bn9.weight": 2.0}))


def test_the_first_clamp_of_learned_factors_warns_once() -> None:
    scales, params, optimizer = _case()
    with torch.no_grad():
        params[0][0], params[3][:2] = 1.5, -0.5
    set_gradients(params, 0)
    with pytest.warns(
        UserWarning,
        match=r"3 values in 2 of 4 .* outside \[0, 1\] .*bn0.weight \(1\), bn3.weight \(2\)",
    ):
        step(optimizer, scales, REG)
    assert 0 <= min(p.min() for p in params) and max(p.max() for p in params) <= 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        params[0][0] = 1.5
        step(optimizer, scales, REG)
        step(optimizer, scales, L1(0.02))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("gate", "a.gate"), "gates lie outside .* gates of 1"),
        (("delegate", "a.weight"), "BatchNorm weights lie outside .* put gates behind"),
        (("a.gate", "b.weight"), "scaling factors lie outside"),
    ],
)
def test_the_first_clamp_calls_gates_gates(names: tuple[str, str], words: str) -> None:
    scales = ScalingFactors({name: nn.Parameter(torch.full((2,), 1.5)) for name in names})
    for gamma in scales.values():
        gamma.grad = torch.zeros_like(gamma)
    with pytest.warns(UserWarning, match=f"4 values in 2 of 2 {words}"):
        step(SGD(scales.values(), lr=0.1), scales, REG)


def test_importing_the_step_does_not_import_dynamo() -> None:
    code = "import sys, polarfast; assert 'torch._dynamo' not in sys.modules, 'torch._dynamo'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("way", ["alone", "attached", "both", "in turns"])
def test_steps_that_are_taken_twice_are_told_of_once(kind: type[SGD], way: str) -> None:
    scales = make_scales()
    optimizer = kind(list(scales.values()), lr=1e-3)
    if way == "attached":
        attach(optimizer, scales, REG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(8):
            set_gradients(list(scales.values()), number)
            if way in ("both", "attached") or (way == "in turns" and number % 2):
                optimizer.step()
            if way != "attached":
                step(optimizer, scales, REG)
    told = [str(each.message) for each in caught if "taken twice" in str(each.message)]
    assert len(told) == (way == "both")
    assert not told or "something changed 'bn0.weight'" in told[0]
