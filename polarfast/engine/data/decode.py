"""Stored images: read one at a time, or all decoded into one array."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...errors import ArgumentError
from .batches import Transform, as_stored

if TYPE_CHECKING:
    import numpy

_log = logging.getLogger(__name__)

CHUNK = 256  # images a task; with fewer, small images would cost more to hand out than to decode
REPORT_SECONDS = 5.0


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


def probe(images: Images, fit: Transform, skip_bad: bool) -> tuple[int, int, int]:
    """Channels, height and width of the first image that can be read, after ``fit``."""
    for index in range(len(images)):
        try:
            channels, height, width = fit(images.read(index)).shape
        except UnreadableImage:
            if not skip_bad:
                raise
            continue
        return channels, height, width
    raise ArgumentError(f"none of the {len(images)} images can be read")


def wrong_size(images: Images, index: int, found: Sequence[int], expected: Sequence[int]) -> str:
    """The message for an image of another size than the first."""
    return (
        f"{images.name(index)} is {found[2]}x{found[1]} pixels, the first one {expected[2]}x"
        f"{expected[1]} (width x height): set data.image_size to bring all to one size"
    )


def decode(
    images: Images, fit: Transform, shape: tuple[int, int, int], skip_bad: bool
) -> tuple[ArrayImages, list[str]]:
    """All images in one uint8 array ``[N, C, H, W]``, without the bad ones if they are skipped.

    Args:
        fit: applied to each image.
        shape: channels, height and width after ``fit``.

    Returns:
        The images, and for each image that is left out why.

    Raises:
        UnreadableImage: an image cannot be read, and ``skip_bad`` is False.
        ArgumentError: an image has another size than the first.
    """
    if isinstance(images, ArrayImages):
        if fit is as_stored:
            return images, []
        chunks = [fit(chunk) for chunk in images.pixels.split(CHUNK)]
        return ArrayImages(torch.cat(chunks), images.labels), []
    pixels = torch.empty(len(images), *shape, dtype=torch.uint8)
    good = torch.ones(len(images), dtype=torch.bool)

    def decode_chunk(start: int) -> list[str]:
        bad = []
        for index in range(start, min(start + CHUNK, len(images))):
            try:
                image = fit(images.read(index))
            except UnreadableImage as error:
                if not skip_bad:
                    raise
                good[index] = False
                bad.append(str(error))
                continue
            if image.shape != shape:
                raise ArgumentError(wrong_size(images, index, image.shape, shape))
            pixels[index] = image
        return bad

    # Threads, not processes: decoders release Python's lock, and the array needs no copying.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        bad = _with_progress(pool, decode_chunk, len(images))
    if bad:
        pixels = pixels[good]
    return ArrayImages(pixels, images.labels[good]), bad


def _with_progress(
    pool: ThreadPoolExecutor, decode_chunk: Callable[[int], list[str]], count: int
) -> list[str]:
    """Run all chunks in order; a line in the log every few seconds."""
    bad: list[str] = []
    begin = reported = time.monotonic()
    for number, chunk_bad in enumerate(pool.map(decode_chunk, range(0, count, CHUNK)), start=1):
        bad += chunk_bad
        now, done = time.monotonic(), min(number * CHUNK, count)
        if now - reported > REPORT_SECONDS or done == count:
            rate = done / max(now - begin, 1e-9)
            _log.info("decoded %d of %d images, %.0f a second", done, count, rate)
            reported = now
    return bad
