"""Whole loops against the oracle, and recorded steps against eager ones: on the CPU what runs there
(which also shows that the oracles see errors), on a GPU all of it.
"""

from functools import partial

import pytest
import torch
from support.real_loops import INFINITE_AT, LOOPS, SETTLED, NumericalError, follow
from support.replays import check_replays, on_internal_stream, on_warm_up_stream
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import polarfast as pf

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
STEPS = INFINITE_AT + 3
RIGHT_STEP = pf.step


def network() -> nn.Module:
    """A residual network of convolutions alone, the classifier included."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1, bias=False),
                nn.BatchNorm2d(24),
                nn.ReLU(),
                nn.Conv2d(24, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.branch(x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.blocks = nn.Sequential(Block(), Block())
            self.head = nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x))).mean((2, 3))

    return Network()


def batch(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images.to(device), torch.randint(5, (8,), generator=generator).to(device)


def cases() -> list:
    on_cpu = [(name, "cpu", ()) for name, loop in LOOPS.items() if not loop.gpu_only]
    on_gpu = [(name, "cuda", GPU) for name in LOOPS]
    return [pytest.param(n, d, marks=marks, id=f"{n}-{d}") for n, d, marks in on_cpu + on_gpu]


@pytest.mark.parametrize(("name", "device"), cases())
def test_every_step_is_the_oracle_s(name: str, device: str) -> None:
    found = follow(LOOPS[name], network, *batch(device), steps=STEPS)
    assert found.factors == 2 * (24 + 16)
    assert found.skipped == LOOPS[name].scaler
    if not LOOPS[name].set_to_none:
        assert not any(found.uploads[SETTLED:])


def forgetful_step(optimizer, scales, reg, scaler):
    """The classic mistake: ∂γ̄/∂γ is left out."""
    gammas = list(scales.values())
    mean = torch.cat([gamma.detach() for gamma in gammas]).mean()
    for gamma in gammas:
        gamma.grad += reg.lam * (reg.t * gamma.detach().sign() - (gamma.detach() - mean).sign())
    optimizer.step()
    with torch.no_grad():
        for gamma in gammas:
            gamma.clamp_(0, reg.upper)


def unclamped_step(optimizer, scales, reg, scaler):
    unclamped = pf.Polarization(reg.lam, reg.t, upper=None)
    RIGHT_STEP(optimizer, scales, unclamped, scaler=scaler)


@pytest.mark.parametrize("step", [forgetful_step, unclamped_step])
@pytest.mark.parametrize("name", ["SGD fused", "AdamW fused"])
def test_the_oracle_sees_a_wrong_step(name: str, step, monkeypatch) -> None:
    monkeypatch.setattr(pf, "step", step)
    with pytest.raises(NumericalError, match="off"):
        follow(LOOPS[name], network, *batch("cpu"), steps=40)


def test_a_skipped_step_that_moves_is_seen(monkeypatch) -> None:
    def insist(optimizer, scales, reg, scaler):
        scaler.unscale_(optimizer)
        RIGHT_STEP(optimizer, scales, reg)

    monkeypatch.setattr(pf, "step", insist)
    with pytest.raises(NumericalError, match=f"step {INFINITE_AT}"):
        follow(LOOPS["GradScaler, SGD fused"], network, *batch("cpu"), steps=STEPS)


def eagerly(step, warmed):
    """In place of a recorder: a replay is a step."""
    return step


OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": partial(AdamW, lr=1e-3),
    "AdamW capturable": partial(AdamW, lr=1e-3, capturable=True),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_replays_that_are_steps(name: str, set_to_none: bool) -> None:
    check_replays(eagerly, OPTIMIZERS[name], network, *batch("cpu"), set_to_none=set_to_none)


def test_a_replay_that_does_less_is_seen() -> None:
    def empty(step, warmed):
        return lambda: None

    with pytest.raises(NumericalError, match="tensors differ"):
        check_replays(empty, OPTIMIZERS["SGD"], network, *batch("cpu"), set_to_none=True)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("record", [on_internal_stream, on_warm_up_stream])
@pytest.mark.parametrize("name", ["SGD", "AdamW capturable"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_captured_step_replays_to_the_bit(name: str, record, set_to_none: bool) -> None:
    make = OPTIMIZERS[name]
    check_replays(record, make, network, *batch("cuda"), set_to_none=set_to_none)
