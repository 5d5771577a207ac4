"""MNIST and Fashion-MNIST: four files of bytes with a short header (the IDX format).

Parsed here rather than by torchvision, which takes no checksum but its own for an answer and
tells a damaged file by an assertion.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ....errors import ArgumentError
from ..decode import ArrayImages

CLASSES = 10
SOURCES = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
MOST_BYTES = 2**27  # unpacked; the real ones have 47 million
_BYTES = 0x08  # the type code of unsigned bytes, the third byte of the header


def read(root: Path, folder: str, train: bool) -> ArrayImages:
    """The training or the test images, uint8 ``[N, 1, H, W]``.

    Args:
        root: holds ``<folder>/raw/train-images-idx3-ubyte`` and the others, with or without .gz.
        folder: "MNIST" or "FashionMNIST".
    """
    part = "train" if train else "t10k"
    images, path = _read_idx(root, folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels, label_path = _read_idx(root, folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels) or len(images) == 0:
        raise ArgumentError(
            f"'{path}' holds {len(images)} images and '{label_path}' {len(labels)} labels; get "
            f"both again from {SOURCES[folder]}"
        )
    if int(labels.max()) >= CLASSES:
        raise ArgumentError(f"'{label_path}' holds label {int(labels.max())}; {CLASSES} are known")
    return ArrayImages(images.unsqueeze(1), labels.long())


def _read_idx(root: Path, folder: str, name: str, dimensions: int) -> tuple[Tensor, Path]:
    plain = root / folder / "raw" / name
    packed = plain.with_name(f"{name}.gz")
    path = plain if plain.is_file() else packed
    try:
        with open(path, "rb") if path == plain else gzip.open(path) as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise ArgumentError(
            f"'{plain}' is missing, and so is {packed.name}; get it from {SOURCES[folder]} or let "
            f'torchvision.datasets.{folder}("{root}", download=True) fetch all four files'
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(
            f"'{path}' cannot be unpacked ({error}); get it again from {SOURCES[folder]}"
        ) from error
    return _parse_idx(content, path, folder, dimensions), path


def _parse_idx(content: bytes, path: Path, folder: str, dimensions: int) -> Tensor:
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, _BYTES, dimensions))
    if start <= len(content) <= MOST_BYTES and content.startswith(magic):
        shape = struct.unpack(f">{dimensions}I", content[4:start])
        if len(content) == start + math.prod(shape):
            return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
    raise ArgumentError(
        f"'{path}' is damaged or not an IDX file of bytes in {dimensions} dimensions "
        f"({len(content)} bytes unpacked); get it again from {SOURCES[folder]}"
    )
