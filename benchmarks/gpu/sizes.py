"""The networks of a run and their scaling factors, by number of γ."""

from __future__ import annotations

import torch
from torch import nn

import polarfast as pf
from polarfast.engine.models import resnet

_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks of ResNet-50, and their width
_BN1_BN2 = [width for blocks, width in _STAGES for _ in range(2 * blocks)]
_BN3 = [4 * width for blocks, width in _STAGES for _ in range(blocks)]
_REST = [64] + [4 * width for _, width in _STAGES]  # stem and projections

#: Number of γ -> that of each layer: CIFAR ResNet-56; ResNet-50's first two norms of a block (the
#: paper's), all three of a block, and all there are.
WIDTHS = {
    2_016: [width for width in (16, 32, 64) for _ in range(18)],
    7_552: _BN1_BN2,
    22_656: _BN1_BN2 + _BN3,
    26_560: _BN1_BN2 + _BN3 + _REST,
}


def factors(widths: list[int], device: str) -> pf.ScalingFactors:
    """Random γ in [0, 1) with gradients, the same on every device."""
    generator = torch.Generator().manual_seed(len(widths))
    named = {}
    for i, width in enumerate(widths):
        gamma = nn.Parameter(torch.rand(width, generator=generator).to(device))
        gamma.grad = 1e-2 * torch.randn(width, generator=generator).to(device)
        named[f"bn{i}.weight"] = gamma
    return pf.ScalingFactors(named)


def resnet50(classes: int = 1000) -> nn.Module:
    """torchvision's, else timm's: the same network."""
    try:
        import torchvision
    except ImportError:
        import timm

        return timm.create_model("resnet50", num_classes=classes)
    return torchvision.models.resnet50(num_classes=classes)


def cifar_resnet(depth: int) -> nn.Module:
    return resnet(depth)
