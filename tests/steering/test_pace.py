"""How fast optimizers move factors, beside the optimizers themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nets import chain
from torch import nn

import polarfast as pf
from polarfast.sharding import Part
from polarfast.steering.pace import coasting, strength_for

X = torch.randn(1, 3, 8, 8, dtype=torch.float64)
MOVED = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}


def factors() -> tuple[nn.Module, pf.ScalingFactors]:
    torch.manual_seed(0)
    model = chain().double()
    scales = pf.scaling_factors(model, X)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.uniform_(-1, 1)
    return model, scales


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(MOVED)),
    rate=st.floats(1e-3, 0.5),
    momentum=st.floats(0.0, 0.95),
    nesterov=st.booleans(),
    dampening=st.floats(0.0, 0.9),
    pushed=st.integers(1, 5),
)
def test_momentum_carries_factors_as_far_as_is_said(
    name, rate, momentum, nesterov, dampening, pushed
):
    """Some steps with gradients, then none until all is at rest."""
    _, scales = factors()
    options = {"momentum": momentum}
    if name == "sgd":
        nesterov = nesterov and momentum > 0
        options |= {"nesterov": nesterov, "dampening": 0.0 if nesterov else dampening}
    optimizer = MOVED[name](list(scales.values()), rate, **options)
    generator = torch.Generator().manual_seed(pushed)
    for _ in range(pushed):
        for gamma in scales.values():
            gamma.grad = torch.randn(gamma.shape, generator=generator, dtype=gamma.dtype)
        optimizer.step()
    before = {name: gamma.detach().clone() for name, gamma in scales.items()}
    far = coasting(scales, optimizer)
    for _ in range(400):
        for gamma in scales.values():
            gamma.grad = torch.zeros_like(gamma)
        optimizer.step()
    assert set(far) == (set(scales) if momentum else set())
    for name, way in far.items():
        went = (before[name] - scales[name].detach()) * before[name].sign()  # towards 0
        torch.testing.assert_close(way, went.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_where_factors_come_to_rest_moves_without_delay(nesterov):
    """By lr/(1 − μ) times the gradient in every step, from the first on."""
    _, scales = factors()
    with torch.no_grad():
        for gamma in scales.values():
            gamma.fill_(100.0)
    optimizer = torch.optim.SGD(list(scales.values()), 0.1, momentum=0.9, nesterov=nesterov)
    rest = 100.0
    for _ in range(6):
        for gamma in scales.values():
            gamma.grad = torch.full_like(gamma, 0.5)
        optimizer.step()
        rest -= 0.1 * 0.5 / (1 - 0.9)
        for name, far in coasting(scales, optimizer).items():
            torch.testing.assert_close(
                scales[name].detach() - far, torch.full_like(scales[name], rest)
            )


def test_adam_and_a_training_that_has_not_begun_carry_nothing():
    _, scales = factors()
    for make in (torch.optim.Adam, torch.optim.SGD):
        optimizer = make(list(scales.values()), 0.1)
        assert coasting(scales, optimizer) == {}
        for gamma in scales.values():
            gamma.grad = torch.ones_like(gamma)
        optimizer.step()
        assert coasting(scales, optimizer) == {}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_strength_for_a_speed_gives_that_speed(momentum):
    """In the long run: a factor under its center has the gradient 2λ."""
    _, scales = factors()
    optimizer = torch.optim.SGD(list(scales.values()), 0.1, momentum=momentum)
    lam = strength_for(0.25, scales, optimizer, Part(scales), None)
    (first, *_) = scales.values()
    for _ in range(200):
        before = first.detach().clone()
        first.grad = torch.full_like(first, 2 * lam)
        optimizer.step()
    torch.testing.assert_close(before - first.detach(), torch.full_like(first, 0.25))
