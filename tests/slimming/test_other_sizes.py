"""Planned on small images, a slim model is exact on large ones too, or the plan says where not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nets
from torch import nn

import polarfast as pf

SMALLEST = 8
SIZES = ((16, 16), (24, 40), (33, 17))


def block(c_in, c_out, kernel=3, stride=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class Between(nn.Module):
    """Something between a pruned layer, whose map is 1x1 at the smallest size, and its reader."""

    def __init__(self, middle, stride=2):
        super().__init__()
        self.body = nn.Sequential(block(3, 12, stride=2), block(12, 16, stride=stride))
        self.last, self.middle = block(16, 16, stride=stride), middle
        self.reader, self.fc = block(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.reader(self.middle(self.last(self.body(x)))).mean((2, 3)))


class Up(nn.Module):
    """U-Net's: the deeper map is padded to the size of the skip, at odd sizes alone."""

    def __init__(self):
        super().__init__()
        self.top, self.down, self.deep = block(3, 8), nn.MaxPool2d(2), block(8, 12)
        self.up, self.join, self.fc = block(12, 8, 1), block(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        top = self.top(x)
        deep = F.interpolate(self.up(self.deep(self.down(top))), scale_factor=2)
        missing = [
            large - small for large, small in zip(top.shape[2:], deep.shape[2:], strict=False)
        ]
        deep = F.pad(deep, [0, missing[1], 0, missing[0]])
        return self.fc(self.join(torch.cat([top, deep], 1)).mean((2, 3)))


class Summed(nn.Module):
    """Adds up over all places: a constant grows with the image."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(block(3, 8), block(8, 12)), nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.body(x).sum((2, 3)))


def depthwise(kernel=3):
    conv = nn.Conv2d(16, 16, kernel, padding=kernel // 2, groups=16, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU())


NETS = {
    "depthwise": (lambda: Between(depthwise()), True),
    "wide depthwise": (lambda: Between(depthwise(7)), True),
    "padded pool": (lambda: Between(nn.AvgPool2d(3, 1, 1)), False),
    "max pool": (lambda: Between(nn.MaxPool2d(3, 1, 1)), False),
    "pool to a grid": (lambda: Between(nn.AdaptiveAvgPool2d(3)), False),
    "zero padding": (lambda: Between(nn.ZeroPad2d(1)), False),
    "reflection": (lambda: Between(nn.ReflectionPad2d(1), stride=1), False),
    "up": (Up, False),
    "summed": (Summed, False),
    "residual": (nets.Residual, False),
    "branches": (nets.Branches, False),
    "grouped": (nets.Grouped, False),
}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(NETS)),
    st.sampled_from(["keep", "expand", "couple"]),
    st.integers(0, 999),
)
def test_exact_at_every_size_or_named(name, residual, seed):
    build, named = NETS[name]
    x = torch.rand(2, 3, SMALLEST, SMALLEST, dtype=torch.float64)
    model = nets.settle(build(), torch.rand(8, 3, 24, 24), seed=seed)
    scales = pf.scaling_factors(model, x, residual=residual)
    nets.zero(scales, seed=seed)
    plan = pf.plan(model, x, scales, "fixed", value=0.0)
    slim = pf.slim(model, plan)
    assert bool(plan.inexact) <= named
    with torch.no_grad():
        for size in ((SMALLEST, SMALLEST), *(SIZES if not plan.inexact else ())):
            images = torch.rand(2, 3, *size, dtype=torch.float64)
            torch.testing.assert_close(slim(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, (_, named) in NETS.items() if named])
def test_what_shows_at_other_sizes_alone_is_named(name):
    """At the size of the example it is exact, and it is known that it is not elsewhere."""
    x = torch.rand(2, 3, SMALLEST, SMALLEST, dtype=torch.float64)
    model = nets.settle(NETS[name][0](), torch.rand(8, 3, 24, 24))
    scales = pf.scaling_factors(model, x)
    nets.zero(scales)
    plan = pf.plan(model, x, scales, "fixed", value=0.0)
    assert any("other sizes" in why or "size of the input" in why for why in plan.inexact.values())
    slim = pf.slim(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(slim(x), model(x), rtol=1e-9, atol=1e-9)
    assert "other sizes" in str(plan) or "size of the input" in str(plan)


def test_a_network_of_one_size_is_exact_there():
    """Its size is fixed by a linear layer over all places: no other size can come."""
    model = nn.Sequential(
        *(block(3, 16, stride=2), block(16, 16, stride=2), depthwise()),
        *(nn.Flatten(), nn.Linear(64, 5)),
    )
    x = torch.rand(2, 3, SMALLEST, SMALLEST, dtype=torch.float64)
    nets.settle(model, x)
    scales = pf.scaling_factors(model, x)
    nets.zero(scales)
    plan = pf.plan(model, x, scales, "fixed", value=0.0)
    assert not any("other sizes" in why for why in plan.inexact.values())
