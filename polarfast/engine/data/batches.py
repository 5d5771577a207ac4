"""From stored images to a batch: augmented, cropped, normalized."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ArgumentError
from .settings import Data

Transform = Callable[[Tensor], Tensor]
# ImageNet's usual test: the shorter side to 256 for a crop of 224.
TEST_RESIZE = 256 / 224


@dataclass(frozen=True)
class Moves:
    """What is done to each of N images, drawn beforehand.

    Attributes:
        corners: int64 ``[2, N]``, row and column of the window in the padded image; both equal to
            the padding leave an image where it is.
        flipped: bool ``[N]``; None where no image is mirrored.
    """

    corners: Tensor
    flipped: Tensor | None

    def __getitem__(self, rows: slice) -> "Moves":
        flipped = None if self.flipped is None else self.flipped[rows]
        return Moves(self.corners[:, rows], flipped)


def draw_moves(count: int, pixels: int, flip: bool, seed: int) -> Moves:
    """Shifts of at most ``pixels`` either way and, with ``flip``, mirrors with a chance of 1/2."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(2 * pixels + 1, (2, count), generator=generator)
    return Moves(corners, torch.rand(count, generator=generator) < 0.5 if flip else None)


def move(images: Tensor, pixels: int, moves: Moves) -> Tensor:
    """Pad with 0 (black before normalization), cut out each image's window, mirror some.

    Args:
        images: ``[N, C, H, W]``, any dtype.
        pixels: width of the padding; the largest shift.
    """
    if pixels:
        _, _, height, width = images.shape
        rows, columns = moves.corners.to(images.device)
        windows = F.pad(images, (pixels,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images), device=images.device), :, rows, columns]
    if moves.flipped is not None:
        flipped = moves.flipped.to(images.device).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(3), images)
    return images


def as_stored(image: Tensor) -> Tensor:
    """Nothing to do: images keep their stored size."""
    return image


def fit(data: Data) -> Transform:
    """What brings an image to the size that the model sees, without chance."""
    from torchvision.transforms import v2

    if data.side == 0:
        return as_stored
    cuts = data.augment == "resized-crop-flip"
    shorter = round(data.side * TEST_RESIZE) if cuts else data.side
    return v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(data.side)])


def vary(data: Data, shape: tuple[int, int, int]) -> Transform:
    """What a streamed training image goes through, by torch's global generator.

    Args:
        shape: channels, height and width that the model sees.
    """
    from torchvision.transforms import v2

    if data.augment == "resized-crop-flip":
        cut = v2.RandomResizedCrop(data.side, antialias=True)
        return v2.Compose([cut, v2.RandomHorizontalFlip()])
    if data.augment == "none":
        return fit(data)
    steps = [] if data.side == 0 else [fit(data)]
    steps.append(v2.RandomCrop(shape[1:], padding=data.pad))
    if data.augment == "crop-flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


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


#: Data set -> the constants in common use.
NORMALIZATIONS = {
    "cifar10": _bytes((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _bytes((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": _bytes((0.1307,), (0.3081,)),
    "fashion-mnist": _bytes((0.2860,), (0.3530,)),
}
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
