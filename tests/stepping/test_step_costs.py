"""What a step costs, counted: calls of Python functions, tensors made."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.allocations import Allocations
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import polarfast as pf

pytestmark = pytest.mark.guard

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, 0.1, momentum=0.9),
    "SGD, fused": lambda params: SGD(params, 0.1, momentum=0.9, fused=True),
    "AdamW, fused": lambda params: AdamW(params, 1e-3, fused=True),
}
FEW, MANY = 4, 24
#: Calls of a step with the optimizer's own, less those of the optimizer alone.
MOST = 130


def network(layers: int) -> nn.Module:
    model = nn.Sequential()
    for _ in range(layers):
        model.extend([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()])
    return model.extend([nn.Flatten(), nn.Linear(16, 2)])


def calls(work: Callable[[], object]) -> int:
    """How many functions, Python's own and C's, this calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def steady(kind: str, layers: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """`pf.step` after some steps, and the optimizer's own."""
    model, x = network(layers), torch.rand(2, 4, 2, 2)
    scales, reg = pf.scaling_factors(model, x), pf.Polarization(1e-4, 1.2)
    optimizer = OPTIMIZERS[kind](model.parameters())
    model(x).sum().backward()
    for _ in range(5):
        pf.step(optimizer, scales, reg)
    return lambda: pf.step(optimizer, scales, reg), optimizer.step


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_calls_do_not_grow_with_the_layers(kind: str) -> None:
    more = {}
    for layers in (FEW, MANY):
        ours, plain = steady(kind, layers)
        more[layers] = calls(ours) - calls(plain)
    assert more[MANY] <= more[FEW] <= MOST


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_tensor_is_made_but_the_optimizer_s(kind: str) -> None:
    ours, plain = steady(kind, MANY)
    with Allocations() as own:
        plain()
    with Allocations() as all_of_it:
        ours()
    assert all_of_it.peak <= own.peak and all_of_it.now == 0
