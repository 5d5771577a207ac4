"""Labelled images that are not decoded yet, or stored as arrays; and what goes wrong in reading."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from polarfast.errors import ArgumentError

if TYPE_CHECKING:
    import numpy


class UnreadableImage(ArgumentError):
    """One image of many cannot be decoded; ``skip_bad_images`` leaves it out."""


def read_file(path: str) -> Tensor:
    """Decode an image file to RGB, uint8 ``[3, H, W]``.

    By Pillow: torchvision's own decoders are about to be removed from it. What is in the file
    counts, not its name: ImageNet holds a PNG that is called .JPEG. Orientation tags are not
    applied, as in torchvision's data sets.

    Raises:
        UnreadableImage: missing, truncated, damaged, or of a kind that is not 8 bits a channel.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise ValueError(f"not 8 bits a channel but Pillow's mode {image.mode}")
            return pil_to_tensor(image.convert("RGB"))
    except MemoryError:
        raise
    # Decoders raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        raise UnreadableImage(
            f"image '{path}' cannot be read ({error}); replace or remove the file, or run with "
            "--data.skip-bad-images to leave such images out"
        ) from error


class Images(Protocol):
    """Images with labels, read one at a time.

    Attributes:
        labels: int64 ``[N]``.
    """

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """uint8 ``[C, H, W]``. Raises UnreadableImage, which names the file."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def pick(self, indices: Tensor) -> "Images":
        """The images at ``indices``, in that order."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images stored as one array; ``pixels`` is uint8, or float32 for digits, ``[N, C, H, W]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """One image ``[C, H, W]``."""
        return self.pixels[index]

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"image number {index}"

    def pick(self, indices: Tensor) -> "ArrayImages":
        """The images at ``indices``, in that order."""
        return ArrayImages(self.pixels[indices], self.labels[indices])


class FileImages:
    """Images in files of their own.

    The names are one array, not a list of strings: reference counts would make every worker
    process copy the pages that they lie on, over a million names for ImageNet.

    Args:
        folder: what the names are relative to.
        names: NumPy array of bytes ``[N]``, file names as the file system spells them.
        labels: int64 ``[N]``.
    """

    def __init__(self, folder: str | Path, names: "numpy.ndarray", labels: Tensor) -> None:
        self.folder, self.names, self.labels = str(folder), names, labels

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Where image ``index`` is; plain text, since a Path takes half as long as decoding."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def read(self, index: int) -> Tensor:
        """Decode one image to RGB, uint8 ``[3, H, W]``."""
        return read_file(self.path(index))

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"image '{self.path(index)}'"

    def pick(self, indices: Tensor) -> "FileImages":
        """The images at ``indices``, in that order."""
        return FileImages(self.folder, self.names[indices.numpy()], self.labels[indices])
