"""suggest_lam: what it suggests moves γ as far as it says."""

import pytest
import torch
from support.nets import chain

import polarfast as pf

X = torch.randn(2, 3, 12, 12)


def start(rate=0.1, **options):
    model = chain()
    scales = pf.scaling_factors(model, X)
    pf.init_scales(scales, 0.5)
    return model, scales, torch.optim.SGD(model.parameters(), rate, **options)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}])
@pytest.mark.parametrize("t", [0.0, 1.2])
def test_without_a_task_it_goes_the_way_six_times(options, t):
    """Measured on a γ under the mean, as far from 0 as the way is long, not clamped."""
    model, scales, optimizer = start(0.01, **options)
    steps = 400
    lam = pf.suggest_lam(optimizer, scales, steps, t=t, average=1.0)
    first = next(iter(scales.values()))
    with torch.no_grad():
        for gamma in scales.values():
            gamma.fill_(100.0)
        first[0] = 50.0
    reg = pf.Polarization(lam, t, upper=None)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        pf.step(optimizer, scales, reg)
    n = scales.numel()
    share = (n - 2) / n  # the mean's own derivative: nearly all lie above it
    moved = 50.0 - float(first[0].detach())
    assert moved == pytest.approx(6 * 0.5 * (t + 1 + share) / (t + 1), rel=0.03)


def test_less_is_needed_in_more_steps_and_for_smaller_factors():
    _, scales, optimizer = start(momentum=0.9)
    lam = pf.suggest_lam(optimizer, scales, 100)
    assert pf.suggest_lam(optimizer, scales, 1000) == pytest.approx(lam / 10)
    assert pf.suggest_lam(optimizer, scales, 100, average=1.0) == pytest.approx(lam / 2)
    pf.init_scales(scales, 0.25)
    assert pf.suggest_lam(optimizer, scales, 100) == pytest.approx(lam / 2)


def test_what_cannot_be_said_is_refused():
    model, scales, optimizer = start()
    with pytest.raises(pf.ArgumentError, match="Adam divides gradients .*FlopsTarget"):
        pf.suggest_lam(torch.optim.Adam(model.parameters()), scales, 100)
    other = torch.optim.SGD(chain().parameters(), 0.1)
    with pytest.raises(pf.ScalingFactorError, match="no parameter group"):
        pf.suggest_lam(other, scales, 100)
    for name, value in [("steps", 0), ("steps", 1.5), ("average", 0.0), ("t", 3.0), ("t", -1.5)]:
        with pytest.raises(pf.ArgumentError, match=name):
            pf.suggest_lam(optimizer, scales, **{"steps": 100, name: value})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(pf.ArgumentError, match="learning rate is 0"):
        pf.suggest_lam(optimizer, scales, 100)
