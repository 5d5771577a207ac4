"""Networks with layers that no BatchNorm follows, for the tests of gates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.nets import conv_bn


class Tokens(nn.Module):
    """Two MLP blocks on tokens [N, L, C], as in a vision transformer; in front, BatchNorms."""

    def __init__(self, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
        self.embed = nn.Sequential(*conv_bn(6, 8, 4, padding=0, stride=8), nn.ReLU())
        self.lift = nn.Conv2d(8, 12, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 20, bias=i > 0), act(), nn.Linear(20, 12)) for i in range(2)
        )
        self.scale = nn.Parameter(torch.full((12,), 0.5))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(self.embed(self.stem(x))).flatten(2).transpose(1, 2)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + self.scale * mlp(norm(x))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """Torch's own transformer layers, which have a fused form that calls none of their layers."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(
            16, 2, 24, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class ActivatedNorm(nn.BatchNorm2d):
    """A normalization with its activation, as timm's are."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class SamePadding(nn.Conv2d):
    """A convolution that pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class OwnLinear(nn.Linear):
    """Another name, the same forward."""


def derived() -> nn.Module:
    return nn.Sequential(
        SamePadding(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 12, 3), ActivatedNorm(12),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), OwnLinear(48, 10), nn.GELU(), nn.Linear(10, 5),
    )  # fmt: skip


def transposed(dims: int, groups: int = 1, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
    return nn.Sequential(
        conv(3, 8, 3, padding=1), act(), up(8, 12, 4, 2, 1, groups=groups, bias=False), act(),
        up(12, 6, 3, groups=groups), act(), conv(6, 4, 1),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers = pytest.importorskip("torchvision").models.vgg.make_layers
    return nn.Sequential(
        layers([8, "M", 12, "M", 16, 16, "M"]), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5),
    )  # fmt: skip


def squeezenet() -> nn.Module:
    return pytest.importorskip("torchvision").models.squeezenet1_1(num_classes=5)


def convnext() -> nn.Module:
    module = pytest.importorskip("torchvision").models.convnext
    stages = [module.CNBlockConfig(12, 16, 2), module.CNBlockConfig(16, None, 2)]
    return module.ConvNeXt(stages, num_classes=5, layer_scale=0.5, stochastic_depth_prob=0.3)


def vit() -> nn.Module:
    return pytest.importorskip("torchvision").models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
        num_classes=5,
    )  # fmt: skip


def swin() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer([2, 2], 12, [2, 2], [2, 2], [4, 4], num_classes=5)


def mobilenet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.mobilenet_v3_small(num_classes=5, width_mult=0.5)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=5, **options)

    return build
