"""Shares to cut with limits on whole networks: reached, sizes as built, widths as asked."""

import pytest
import torch
from support.planning import check_sizes, width

import polarfast as pf

pytestmark = pytest.mark.slow

torchvision = pytest.importorskip("torchvision")
X = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "residual", "of", "limits"),
    [
        ("resnet50", "expand", "macs", {"round_to": 8}),
        ("resnet50", "couple", "params", {"round_to": 32, "max_share": 0.9}),
        ("mobilenet_v2", "expand", "params", {"round_to": 16, "max_share": 0.75}),
        ("densenet121", "keep", "params", {"round_to": 8, "min_channels": 16}),
        ("resnext50_32x4d", "keep", "macs", {"round_to": 32}),
    ],
)
def test_a_share_with_limits(name, residual, of, limits):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    scales = pf.scaling_factors(model, X, residual=residual)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(-1, 1)
                module.bias.normal_()
    reach = pf.reachable(model, X, scales, **limits)
    most = pf.plan(model, X, scales, "fixed", value=2.0, **limits)
    assert reach.macs[1] == pytest.approx(most.flops_reduction)
    assert reach.params[1] == pytest.approx(1 - most.params / most.params_before)
    cut = 0.6 * getattr(reach, of)[1]
    plan = pf.plan(model, X, scales, cut=cut, of=of, **limits)
    # The strongest of all channels that go stays: that is not enough.
    bound = max(layer.threshold for layer in plan.layers.values())
    weaker = torch.nextafter(torch.tensor(bound), torch.tensor(0.0)).item()
    less = pf.plan(model, X, scales, "fixed", value=weaker, **limits)

    def share(plan):
        return 1 - (
            plan.macs / plan.macs_before if of == "macs" else plan.params / plan.params_before
        )

    assert share(less) < cut <= share(plan) < cut + 0.05
    for name, gamma in scales.items():
        kept, note = plan.kept[name].numel(), plan.layers[name].note
        multiple = width(plan, name) % limits["round_to"] == 0
        assert multiple or (kept == gamma.numel() and "whole, since" in note)
        assert gamma.numel() - kept <= limits.get("max_share", 1.0) * gamma.numel()
        assert kept >= min(limits.get("min_channels", 0), gamma.numel())
    check_sizes(model, plan, X)
