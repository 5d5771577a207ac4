"""Inputs that are unlike the example: other sizes, layouts, numbers of samples, lengths, decisions.
What a slim model does not do exactly there, its plan names.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polarfast as pf


def cbr(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def cbr1(c_in: int, c_out: int, kernel: int = 3) -> nn.Module:
    conv = nn.Conv1d(c_in, c_out, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(c_out), nn.ReLU())


class UNet(nn.Module):
    """The deeper map is padded to the skip, and a 1×1 convolution reads both."""

    def __init__(self, channels: int = 3, pool: int = 2) -> None:
        super().__init__()
        self.pool, self.top, self.down = pool, cbr(channels, 8), cbr(8, 12)
        self.up, self.join, self.out = cbr(12, 8, 1), cbr(16, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        deep = self.up(self.down(F.max_pool2d(top, self.pool)))
        deep = F.interpolate(deep, scale_factor=self.pool)
        lack = (0, top.shape[3] - deep.shape[3], 0, top.shape[2] - deep.shape[2])
        return self.out(self.join(torch.cat([top, F.pad(deep, lack)], 1)))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.net = cbr(3, 8, stride=2), UNet(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.stem(x))


class Video(UNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ChannelsLast(UNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class One(UNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None])[0]


class Bytes(UNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.out.weight.dtype) / 255.0)


class Masked(UNet):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * ~mask[:, None])


class Beside(UNet):
    """Features (N, 5) and a number for each sample beside the images."""

    def forward(self, x: Tensor, features: Tensor, number: Tensor) -> Tensor:
        return super().forward(x) * (features.mean(1) * number)[:, None, None, None]


class Small(UNet):
    def forward(self, x: Tensor) -> Tensor:
        if max(x.shape[2:]) > 64:
            raise ValueError("at most 64 × 64")
        return super().forward(x)


class Penalized(UNet):
    """The network computes a penalty on its last weights."""

    def forward(self, x: Tensor) -> Tensor:
        self.penalty = (self.out.weight**2).sum()
        return super().forward(x)


class BackAgain(UNet):
    """One weight there and, transposed, back."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        deep = self.up(self.down(F.max_pool2d(top, self.pool)))
        deep = F.interpolate(deep, scale_factor=self.pool)
        lack = (0, top.shape[3] - deep.shape[3], 0, top.shape[2] - deep.shape[2])
        joined = self.join(torch.cat([top, F.pad(deep, lack)], 1)).mean((2, 3))
        return F.linear(self.norm(self.out(joined)).relu(), self.out.weight.t())


class Difference(nn.Conv2d):
    """A central difference convolution."""

    def forward(self, x: Tensor) -> Tensor:
        center = F.conv2d(x, self.weight.sum((2, 3), keepdim=True))
        return super().forward(x) - 0.7 * center


class Differences(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(Difference(3, 8, 3, 1, 1, bias=False), *cbr(3, 8)[1:])


class Gated(nn.Module):
    """A hard gate behind a norm whose inputs are large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = cbr(3, 16), cbr(16, 12, 1), nn.Linear(12, 4)
        self.gate = cbr(3, 1)[:2]

    def spread(self, by: float) -> nn.Module:
        self.gate[0].weight.data.mul_(by)
        self.gate[1].running_var.fill_(by**2)
        return self

    def forward(self, x: Tensor) -> Tensor:
        opened = (self.gate(x) > 0.9).to(x.dtype)
        return self.out(self.second(self.first(x) * opened).mean((2, 3)))


def uniform(*sizes: int) -> Tensor:
    return torch.randint(0, 256, sizes, dtype=torch.uint8)


class Head(nn.Module):
    """Images (N, 3, H, W); `between` is done to what the first layer writes."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = cbr(3, 16), cbr(16, 12, 1), nn.Linear(12, 4)
        self.between = between

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.out(self.second(self.between(self.first(x), x, *more)).mean((2, 3)))


class Sequence(nn.Module):
    """Features (N, T, C)."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = cbr1(8, 16), cbr1(16, 12, 1), nn.Linear(12, 4)
        self.between = between

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        between = self.between(self.first(x.transpose(1, 2)), *more)
        return self.out(self.second(between).mean(2))


class Waves(Sequence):
    """Waveforms (N, T)."""

    def __init__(self) -> None:
        super().__init__(lambda y: y.logsumexp(2, True))
        self.first = cbr1(1, 16)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x[..., None])


class Bag(nn.Module):
    """The batch is a bag of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = cbr(3, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).mean((2, 3)).sum(0, keepdim=True))


def row_by_row(y: Tensor, lengths: Tensor) -> Tensor:
    mask = y.new_zeros(y.shape[0], 1, y.shape[2])
    for row, length in enumerate(lengths):
        mask[row, :, :length] = 1
    return y * mask


def compared(y: Tensor, lengths: Tensor) -> Tensor:
    return y * (torch.arange(y.shape[2]) < lengths[:, None])[:, None]


def asserted(y: Tensor, lengths: Tensor) -> Tensor:
    assert lengths.max() <= y.shape[2]
    return compared(y, lengths)


RANDN = torch.randn
IMAGES = torch.rand(2, 3, 12, 12) + 0.1
DARK = torch.cat((IMAGES[:, :, :6], torch.zeros(2, 3, 6, 12)), 2)
FULL, SHORT, X = torch.full((4,), 30), torch.tensor([30, 22, 15, 7]), RANDN(4, 30, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "stem of stride 2, then odd": (Stem, RANDN(2, 3, 32, 32), RANDN(2, 3, 34, 34)),
    "pool of 3": (lambda: UNet(pool=3), RANDN(2, 3, 33, 33), RANDN(1, 3, 34, 35)),
    "pool of 7": (lambda: UNet(pool=7), RANDN(2, 3, 14, 14), RANDN(1, 3, 16, 17)),
    "video": (Video, RANDN(2, 2, 3, 8, 8), RANDN(2, 2, 3, 9, 11)),
    "channels last": (ChannelsLast, RANDN(2, 8, 8, 3), RANDN(2, 9, 11, 3)),
    "one image": (One, RANDN(3, 8, 8), RANDN(3, 9, 11)),
    "bytes": (Bytes, uniform(2, 3, 8, 8), uniform(2, 3, 9, 11)),
    "image and mask": (
        Masked,
        (RANDN(2, 3, 8, 8), torch.zeros(2, 8, 8).bool()),
        (RANDN(2, 3, 9, 11), torch.zeros(2, 9, 11).bool()),
    ),
    "image and features": (
        Beside,
        (RANDN(4, 3, 8, 8), RANDN(4, 5), RANDN(4)),
        (RANDN(4, 3, 9, 11), RANDN(4, 5), RANDN(4)),
    ),
    "at most 64": (Small, RANDN(2, 3, 32, 32), RANDN(2, 3, 33, 35)),
    "a weight penalty": (Penalized, RANDN(2, 3, 8, 8), RANDN(2, 3, 9, 11)),
    "back again": (BackAgain, RANDN(2, 3, 8, 8), RANDN(2, 3, 9, 11)),
    "differences": (Differences, RANDN(2, 3, 8, 8), RANDN(2, 3, 9, 11)),
    "a gate behind a wide norm": (lambda: Gated().spread(100), IMAGES, 3 * RANDN(2, 3, 12, 12)),
    "a gate behind a narrow norm": (lambda: Gated().spread(1e-3), IMAGES, 3 * RANDN(2, 3, 12, 12)),
    "a bag": (Bag, RANDN(2, 3, 8, 8), RANDN(5, 3, 8, 8)),
    "logsumexp over time": (
        lambda: Sequence(lambda y: y.logsumexp(2, True)), RANDN(2, 12, 8), RANDN(2, 30, 8),
    ),
    "waveforms": (Waves, RANDN(2, 12), RANDN(2, 30)),
    "row by row": (lambda: Sequence(row_by_row), (X, FULL), (X, SHORT)),
    "asserted": (lambda: Sequence(asserted), (X, FULL), (X, SHORT)),
    "clamped": (
        lambda: Sequence(
            lambda y, n: y * (n[:, None] - torch.arange(y.shape[2])).clamp(0, 1)[:, None]
        ),
        (X, FULL),
        (X, SHORT),
    ),
    "divided by lengths": (
        lambda: Sequence(lambda y, n: y.sum(2, True) / n[:, None, None]), (X, FULL), (X, SHORT),
    ),
    "whole numbers as a mask": (
        lambda: Sequence(lambda y, mask: y * mask[:, None]),
        (X, torch.ones(4, 30).long()),
        (X, (torch.arange(30) < SHORT[:, None]).long()),
    ),
    "sign": (lambda: Head(lambda y, x: y * x.sum(1, True).sign()), IMAGES, DARK),
    "clamp": (lambda: Head(lambda y, x: y * (x.sum(1, True) * 1e3).clamp(0, 1)), IMAGES, DARK),
    "if, as in the example": (
        lambda: Head(lambda y, x: y * 2 if x.mean() < 5 else y), IMAGES, IMAGES + 9,
    ),
    "if, unlike the example": (
        lambda: Head(lambda y, x: y * 2 if x.mean() > 5 else y), IMAGES, IMAGES + 9,
    ),
    "a number read, larger": (
        lambda: Head(lambda y, x: y * 2 if x.mean().item() > 5 else y), IMAGES, IMAGES + 9,
    ),
    "a number read, smaller": (
        lambda: Head(lambda y, x: y * 2 if round(float(x.mean())) < 0 else y), IMAGES, IMAGES - 9,
    ),
    "a grid": (
        lambda: Head(lambda y, x, grid: F.grid_sample(y, grid, align_corners=False)),
        (IMAGES, 0.8 * torch.rand(2, 6, 6, 2) - 0.4),
        (IMAGES, 4 * torch.rand(2, 6, 6, 2) - 2),
    ),
    "lengths as a list": (
        lambda: Sequence(row_by_row), (X, [30, 30, 30, 30]), (X, [30, 22, 15, 7]),
    ),
    "diffusion step": (
        lambda: Head(lambda y, x, t: y * torch.cos(t * 0.01).view(-1, 1, 1, 1)),
        (IMAGES, torch.tensor([3, 3])),
        (IMAGES, torch.tensor([90, 3])),
    ),
}  # fmt: skip


def test_a_mask_that_the_network_makes_is_no_input() -> None:
    """As that of networks for speech, which count all of it unless they are told."""

    def whole(y: Tensor, x: Tensor) -> Tensor:
        lengths = x.new_ones(len(x)) * y.shape[3]
        return y * (torch.arange(y.shape[3]) < lengths[:, None]).to(y)[:, None, None]

    plan = check(lambda: Head(whole), IMAGES, DARK)
    assert not plan.inexact


#: Gates that are the same for all images near the example, whose mean is near 0.
LEVEL_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda m: (m - 5).relu() + 1,
    "relu_": lambda m: (m - 5).relu_() + 1,
    "relu6": lambda m: F.relu6(m + 9),
    "clamp_": lambda m: (m + 1).clamp_(max=0.5),
    "hardtanh_": lambda m: F.hardtanh_(m - 5) + 2,
    "hardsigmoid": lambda m: F.hardsigmoid(m + 9),
    "hardswish": lambda m: F.hardswish(m - 9) + 1,
    "threshold_": lambda m: F.threshold_(m * 1, 5.0, 1.0),
    "softshrink": lambda m: F.softshrink(m, 3) + 1,
    "hardshrink": lambda m: F.hardshrink(m, 3) + 1,
    "maximum": lambda m: torch.maximum(m, torch.tensor(5.0, dtype=m.dtype)),
    "minimum, second": lambda m: torch.minimum(torch.tensor(-5.0, dtype=m.dtype), m),
    "round_": lambda m: (m / 9).round_() + 1,
    "whole quotient": lambda m: (m + 2) // 5 + 1,
    "sign_": lambda m: (m - 5).sign_(),
    "sigmoid": lambda m: torch.sigmoid(1000 - 100 * m),
    # which refuses what is far from the example
    "within a loss": lambda m: F.binary_cross_entropy(
        (m / 10).clamp_min(0.5), torch.ones_like(m), reduction="none"
    ),
}


@pytest.mark.parametrize("name", LEVEL_GATES)
def test_gates_that_are_level_near_the_example(name: str) -> None:
    def gated(y: Tensor, x: Tensor) -> Tensor:
        return y * LEVEL_GATES[name](x.mean((1, 2, 3), keepdim=True))

    check(lambda: Head(gated), IMAGES, IMAGES + torch.tensor([9.0, -9.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("name", CASES)
def test_exact_or_named(name: str) -> None:
    check(*CASES[name])


def check(build: Callable[[], nn.Module], example: Any, other: Any) -> pf.PruningPlan:
    """A network, pruned by an example, on other inputs: it is right there, or named."""
    torch.manual_seed(0)
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.uniform_(0.2, 1.0)

    def doubled(inputs: Any) -> Any:
        if isinstance(inputs, tuple):
            return tuple(map(doubled, inputs))
        if not isinstance(inputs, Tensor):
            return inputs
        return inputs.double() if inputs.is_floating_point() else inputs

    example, other = doubled(example), doubled(other)
    scales = pf.scaling_factors(model, example)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = pf.plan(model, example, scales, "fixed", value=0.0)
        slim = pf.slim(model, plan)
    assert plan.flops_reduction > 0.1
    for inputs in (example, other):
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        with torch.no_grad():
            whole, small = model(*args), slim(*args)
        error = float((whole - small).abs().max() / whole.std())
        assert error < 1e-6 or (plan.inexact and inputs is other), (error, plan.inexact)
    return plan
