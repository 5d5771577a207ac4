"""Scaling factors whose Parameters have memory in common."""

import pytest
import torch
from torch import nn

from polarfast.errors import ScalingFactorError
from polarfast.scaling.factors import scaling_factors

X = torch.zeros(1, 3, 4, 4)


def _pair(make):
    """Two layers whose γ are what `make(tensor)` returns."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model.extend([nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)])
    for norm, weight in zip((model[1], model[4]), make(torch.rand(16)), strict=True):
        norm.weight = nn.Parameter(weight)
    return model


SHARED = {
    "the same": lambda x: (x[:4], x[:4]),
    "in part": lambda x: (x[:4], x[3:7]),
    "in steps": lambda x: (x[:8:2], x[4:8]),
    "a view of each other": lambda x: (x[:4], x[:4].view(2, 2).view(4)),
    "numpy's": lambda x: (torch.from_numpy(x.numpy())[:4], x[:4]),
}


@pytest.mark.parametrize("which", SHARED)
def test_two_parameters_over_one_memory_are_refused_by_name(which):
    """Each would be counted, and moved, as a γ of its own."""
    model = _pair(SHARED[which])
    with pytest.raises(ScalingFactorError, match=r"'[14].weight' and '[14].weight' have channels"):
        scaling_factors(model, X)
    apart = _pair(lambda x: (x[:4].clone(), x[4:8].clone()))
    scales = scaling_factors(apart, X)
    with pytest.raises(ScalingFactorError, match="have channels in the same memory"):
        scales.rebind(model)


def test_a_parameter_whose_channels_are_one_number_is_refused():
    model = _pair(lambda x: (x[:1].expand(4), x[4:8]))
    with pytest.raises(ScalingFactorError, match="'1.weight' have channels in the same memory"):
        scaling_factors(model, X)


def test_pieces_of_one_buffer_that_do_not_touch_each_other_are_factors():
    model = _pair(lambda x: (x[:4], x[4:8]))
    assert list(scaling_factors(model, X)) == ["1.weight", "4.weight"]
    model = _pair(lambda x: (x[:8:2], x[1:8:2]))
    assert list(scaling_factors(model, X)) == ["1.weight", "4.weight"]
    meta = _pair(lambda x: (x[:4], x[4:8])).to("meta")
    assert len(scaling_factors(_pair(lambda x: (x[:4], x[4:8])), X).rebind(meta)) == 2
