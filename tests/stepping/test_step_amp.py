"""The subgradient meets unscaled gradients in every order of calls that GradScaler allows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stepping import Oracle, assert_same, make_scales, set_gradients, task_gradients
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from polarfast.errors import ArgumentError, StepError
from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import Polarization
from polarfast.stepping.step import attach, step

LAM, T, SCALE = 0.02, 1.2, 2.0**16

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD-fused": lambda params: SGD(params, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda params: Adam(params, lr=0.01),
    "Adam-fused": lambda params: Adam(params, lr=0.01, fused=True),
    "AdamW-fused": lambda params: AdamW(params, lr=0.01, fused=True),
}
ORDERS = ["step", "attach", "unscale_ step", "unscale_ attach"]


class Run:
    """Factors, a scaler at 65,536, and one of the four orders of calls."""

    def __init__(self, name: str, order: str) -> None:
        self.scales = make_scales(torch.float64)
        self.params: list[Tensor] = list(self.scales.values())
        self.optimizer = OPTIMIZERS[name](self.params)
        self.scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
        self.scaler.scale(torch.zeros(()))  # creates its state
        self.order = order
        self.reg = Polarization(LAM, T)
        if "attach" in order:
            attach(self.optimizer, self.scales, self.reg)

    def step(self) -> None:
        if "unscale_" in self.order:
            self.scaler.unscale_(self.optimizer)
        if "attach" in self.order:
            self.scaler.step(self.optimizer)
        else:
            step(self.optimizer, self.scales, self.reg, scaler=self.scaler)
        self.scaler.update()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_order_equals_the_unscaled_oracle(name: str, order: str) -> None:
    run = Run(name, order)
    oracle = Oracle(run.params, OPTIMIZERS[name])
    for i in range(5):
        set_gradients(run.params, i, SCALE)
        run.step()
        oracle.step(task_gradients(run.params, i), LAM, T)
    assert_same(run.params, oracle.params, 1e-12)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_nothing_behind(name: str, order: str, at: int) -> None:
    """γ, state and the following steps are as if the step with the infinite gradient never was."""
    run = Run(name, order)
    oracle = Oracle(run.params, OPTIMIZERS[name])
    for i in range(5):
        scale = run.scaler.get_scale()
        run.optimizer.zero_grad()
        set_gradients(run.params, i, scale)
        if i == at:
            before = [param.detach().clone() for param in run.params]
            grad = run.params[1].grad
            assert grad is not None
            grad[3] = torch.inf
            run.step()
            assert_same(run.params, before, 0.0)
            assert run.scaler.get_scale() == scale / 2
            if at == 0 and name == "SGD-fused" and order != "step" and order != "unscale_ step":
                pytest.skip("torch's fused SGD starts from uninitialized momentum after this")
        else:
            run.step()
            oracle.step(task_gradients(run.params, i), LAM, T)
    assert_same(run.params, oracle.params, 1e-12)


@pytest.mark.filterwarnings("ignore:.*outside.*:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_outside_the_range_is_not_clamped_by_a_skipped_step(name: str, order: str) -> None:
    run = Run(name, order)
    run.reg.upper = 0.5
    before = [param.detach().clone() for param in run.params]
    set_gradients(run.params, 0, SCALE)
    grad = run.params[0].grad
    assert grad is not None
    grad[0] = torch.nan
    run.step()
    assert_same(run.params, before, 0.0)


def _train(amp: bool) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    gamma: Any = net[1].weight
    scales = ScalingFactors({"1.weight": gamma})
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=amp)
    for _ in range(5):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        scaler.scale(net(x).square().mean()).backward()
        step(optimizer, scales, Polarization(0.1, T), scaler=scaler)
        scaler.update()
    return list(net.parameters())


@pytest.mark.filterwarnings("ignore:.*outside.*:UserWarning")
def test_a_network_trains_the_same_with_and_without_scaling() -> None:
    """The defect this guards against: λ divided by the loss scale, hence no sparsity under AMP."""
    assert_same(_train(amp=True), _train(amp=False), 1e-5)


def test_a_closure_and_a_scaler() -> None:
    scales = make_scales()
    params = list(scales.values())
    optimizer = SGD(params, lr=0.1)
    before = [param.detach().clone() for param in params]

    def closure() -> None:
        set_gradients(params, 0)

    with pytest.raises(ArgumentError, match="takes no closure"):
        step(optimizer, scales, Polarization(LAM, T), GradScaler("cpu"), closure)
    assert_same(params, before, 0.0)
    step(optimizer, scales, Polarization(LAM, T), GradScaler("cpu", enabled=False), closure)
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize("order", ["step", "attach", "scheduler attach", "attach scheduler"])
def test_an_optimizer_that_is_handed_the_scaler_itself_is_refused(order: str) -> None:
    class OldFused(SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:
            raise AssertionError("must not come here")

    scales, reg = make_scales(), Polarization(LAM, T)
    params = list(scales.values())
    set_gradients(params, 0)
    scaler = GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    optimizer = OldFused(params, lr=0.1)
    for part in order.split():
        if part == "attach":
            attach(optimizer, scales, reg)
        elif part == "scheduler":
            ConstantLR(optimizer)
    with (
        pytest.warns(FutureWarning, match="GradScaler is going to stop"),
        pytest.raises(StepError, match="call scaler.unscale_"),
    ):
        if order == "step":
            step(optimizer, scales, reg, scaler=scaler)
        else:
            scaler.step(optimizer)


def test_a_loss_scale_set_by_hand_is_respected() -> None:
    """A fused optimizer divides by `optimizer.grad_scale` even with no scaler about."""
    scales = make_scales(torch.float64)
    params = list(scales.values())
    optimizer: Any = SGD(params, lr=0.1, fused=True)
    optimizer.grad_scale = torch.tensor(8.0)
    oracle = Oracle(params, lambda p: SGD(p, lr=0.1))
    set_gradients(params, 0, 8.0)
    step(optimizer, scales, Polarization(LAM, T))
    oracle.step(task_gradients(params, 0), LAM, T)
    assert_same(params, oracle.params, 1e-12)
