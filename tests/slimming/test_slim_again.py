"""A slim model is pruned further, norms that put channels back among them."""

import copy
import warnings

import pytest
import torch
from support.nets import conv_bn
from torch import Tensor, nn

import polarfast as pf


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(width, width, 3, padding=1), nn.ReLU(), *conv_bn(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


def network() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 12, 3, padding=1), nn.ReLU(), Block(12), Block(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


@torch.no_grad()
def made_random(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)


def pruned(
    model: nn.Module, x: Tensor, residual: str, every: int, fold: str = "exact"
) -> nn.Module:
    scales = pf.scaling_factors(model, x, residual=residual)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::every] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pf.slim(model, pf.plan(model, x, scales, "fixed", value=0.0, fold=fold))


@pytest.mark.parametrize("fold", ["exact", "bias", "none"])
@pytest.mark.parametrize("residual", ["keep", "expand", "expand-all", "couple"])
def test_a_slim_model_is_slimmed_again(residual: str, fold: str) -> None:
    model, x = network().eval(), torch.randn(2, 3, 10, 12)
    made_random(model, 0)
    first = copy.deepcopy(model)
    once = pruned(model, x, "expand", 3, fold)
    twice = pruned(once, x, residual, 2, fold)  # `slim` compares them
    widths = [
        module.num_features for module in twice.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert all(width in (4, 5) for width in widths[1:])  # 12 → 8 → 4, and a constant channel
    if fold == "exact":  # the first network then computes the same
        twice.polarfast_info.origin.write_back(twice, first)
        torch.testing.assert_close(first(x), twice(x), rtol=1e-4, atol=1e-5)


def test_files_and_training(tmp_path) -> None:
    model, x = network().eval(), torch.randn(4, 3, 10, 12)
    made_random(model, 0)
    once = pruned(model, x, "expand", 3)
    scales = pf.scaling_factors(once, x, residual="expand")
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::2] = 0
    plan = pf.plan(once, x, scales, "fixed", value=0.0)
    twice = pf.slim(once, plan)
    pf.save(twice, plan, tmp_path / "twice.pt")
    loaded = pf.load(tmp_path / "twice.pt", network).eval()
    assert torch.equal(loaded(x), twice(x))
    once.train(), twice.train()
    torch.testing.assert_close(once(x), twice(x), rtol=1e-4, atol=1e-5)


def test_one_training_is_shrunk_again_and_again() -> None:
    """And the last plan of it is of what is left."""
    torch.manual_seed(0)
    model = network()
    images = torch.randn(128, 3, 10, 12)
    labels = (images.mean((1, 2, 3)) > 0).long()
    x = images[:2]
    scales = pf.scaling_factors(model, x, residual="expand")
    pf.init_scales(scales, 0.5)
    reg = pf.FlopsTarget(model, x, scales, cut=0.5, steps=120)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    left = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(120):
            rows = torch.randint(0, 128, (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            pf.step(optimizer, scales, reg)
            if step in (50, 80, 110):
                now = pf.plan(model, x, scales, "fixed", value=0.0)
                left *= 1 - now.flops_reduction
                model = pf.shrink(model, optimizer, now)
                scales = reg.follow(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan = pf.plan(model, x, scales)
        slim = pf.slim(model, plan)
    assert left * (1 - plan.flops_reduction) == pytest.approx(1 - reg.live, abs=0.01)
    assert abs(reg.live - 0.5) < 0.06  # one channel of so small a network
    assert slim(x).shape == (2, 4)
