"""Augmentation of whole batches on their device, each image in its own way.

What happens to each image is drawn on the CPU and carried out on the images' device, so the same
seed varies images alike on every device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
