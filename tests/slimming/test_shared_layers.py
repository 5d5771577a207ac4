"""Layers that run several times: siamese encoders, heads shared by the levels of a pyramid."""

import pytest
import torch
from support.masked import TOLERANCE, masked
from support.nets import conv_bn, settle
from torch import Tensor, nn

import polarfast as pf

X = torch.randn(2, 3, 16, 16, dtype=torch.float64)


class Shared(nn.Module):
    """Padded layers that read each other's constants, run twice."""

    def __init__(self, on: str) -> None:
        super().__init__()
        self.on = on
        self.first = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.second = nn.Sequential(*conv_bn(12, 12), nn.ReLU())
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.first(x), self.first(x.flip(3))
        if self.on == "levels":
            two = two[..., ::2, ::3]
        elif self.on == "other constants":
            two = two * 2 + 1
        return self.last(self.second(one)) - 2 * self.last(self.second(two))


@pytest.mark.parametrize("on", ["the same", "levels", "other constants"])
def test_each_use_of_a_weight_is_looked_at(on: str) -> None:
    model = settle(Shared(on), X)
    scales = pf.scaling_factors(model, X)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::3] = 0
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    slim = pf.slim(model, plan)
    assert bool(plan.inexact) == (on == "other constants")
    for seen in () if plan.inexact else (X, torch.randn(2, 3, 21, 18, dtype=torch.float64)):
        wanted, found = masked(model, plan, False)(seen), slim(seen)
        assert float((wanted - found).abs().max() / wanted.std()) < TOLERANCE
