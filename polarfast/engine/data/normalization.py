"""Mean and spread of each channel, by which images are normalized."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polarfast.errors import ArgumentError


@dataclass(frozen=True)
class Normalization:
    """``(pixel - mean) / std`` in each channel; pixels are 0 to 255 for uint8 images.

    Attributes:
        mean, std: one number a channel, in the units of the pixels as stored.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` as float32; the memory format stays as it is."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() - mean) / std


def _bytes(mean: Sequence[float], std: Sequence[float]) -> Normalization:
    return Normalization(tuple(255 * m for m in mean), tuple(255 * s for s in std))


CIFAR10 = _bytes((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = _bytes((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
MNIST = _bytes((0.1307,), (0.3081,))
FASHION_MNIST = _bytes((0.2860,), (0.3530,))
IMAGENET = _bytes((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def measured(images: Tensor) -> Normalization:
    """Mean and spread of the pixels of all images, uint8 or float ``[N, C, H, W]``, per channel.

    Raises:
        ArgumentError: a channel has the same value everywhere.
    """
    mean, std = [], []
    for channel in range(images.shape[1]):
        pixels = images[:, channel].flatten()
        if images.dtype == torch.uint8:
            # A histogram is exact and needs no float copy of the set.
            counts = torch.bincount(pixels, minlength=256).double()
            levels = torch.arange(256, dtype=torch.float64)
            middle = float(counts @ levels / len(pixels))
            mean.append(middle)
            std.append(math.sqrt(float(counts @ (levels - middle) ** 2 / len(pixels))))
        else:
            mean.append(float(pixels.mean()))
            std.append(float(pixels.std()))
    if min(std) == 0:
        raise ArgumentError(
            f"channel {std.index(0)} has the same value in every pixel of every training image: "
            "the images cannot be normalized; are these the right files?"
        )
    return Normalization(tuple(mean), tuple(std))
