"""What planning and slimming keep in memory, counted storage by storage."""

import pytest
import torch
import torchvision
from support.allocations import Allocations
from support.nets import zero

import polarfast as pf

pytestmark = pytest.mark.guard


@pytest.mark.parametrize("residual", ["keep", "expand"])
def test_planning_and_slimming(residual):
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18().eval(), torch.rand(1, 3, 160, 160)
    largest_map = 64 * 80 * 80 * x.element_size()
    scales = pf.scaling_factors(model, x, residual=residual)
    zero(scales)
    with Allocations() as planning:
        plan = pf.plan(model, x, scales)
    # A forward pass keeps 4 to 6 such maps at once. Its runs are in float64, at larger sizes and of
    # one more sample too.
    assert planning.peak <= 50 * largest_map
    assert planning.now <= 2**21  # what the plan keeps
    with Allocations() as slimming:
        slim = pf.slim(model, plan, verify=False)
    size = sum(t.numel() * t.element_size() for t in slim.state_dict().values())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert slimming.peak <= 1.1 * size + largest
