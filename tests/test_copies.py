"""Networks that keep what they computed, as research code does, can be pruned all the same."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import polarfast as pf
from polarfast.copies import copy_of


class Keeping(nn.Module):
    """Keeps activations of the last forward pass: alone, in a list, in a dict of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)
        self.features: Tensor | None = None
        self.all: list[Tensor] = []
        self.by_name: dict[str, tuple[Tensor, int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.first(x).relu()
        self.all = [self.features, self.second(self.features).relu()]
        self.by_name = {"pooled": (self.all[-1].mean((2, 3)), 1)}
        out: Tensor = self.head(self.by_name["pooled"][0])
        return out


def test_copies_leave_the_way_back_behind() -> None:
    torch.manual_seed(0)
    model, x = Keeping(), torch.randn(2, 3, 8, 8)
    model(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    made = copy_of(model)
    assert made.features.is_leaf and not model.features.is_leaf  # type: ignore[union-attr]
    assert made.features is made.all[0] and torch.equal(made.features, model.features)
    assert torch.equal(made.by_name["pooled"][0], model.by_name["pooled"][0])
    assert made.head.weight is not model.head.weight
    model.zero_grad()
    model(x).sum().backward()
    assert all(param.grad is None for param in made.parameters())


def test_a_network_that_keeps_activations_is_pruned() -> None:
    torch.manual_seed(0)
    model, x = Keeping().eval(), torch.randn(2, 3, 8, 8)
    scales = pf.scaling_factors(model, x)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model(x)
        plan = pf.plan(model, x, scales)
        model(x)
        slim = pf.slim(model, plan)
        slim(x)
        fused = pf.fuse(slim)
        pf.LatencyTable.measure(model, x, seconds=0.05)
    torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-5)
