"""CIFAR-10 and CIFAR-100: pickled batches ("python version"), as their authors give them out.

Parsed here rather than by torchvision, for two reasons: torchvision unpickles with no limit on what
a file may run, and takes files of its own checksums only, so that no cut-down copy can be used.
"""

import io
import math
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....errors import ArgumentError
from ..decode import ArrayImages

SHAPE = (3, 32, 32)
MOST_BYTES = 2**28  # of a file; the largest has 155 million
_HOME = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Layout:
    """Names in one of the two sets: of its folder, archive, files, and the key of the labels."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    classes: int


CIFAR10 = Layout(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    labels="labels",
    classes=10,
)
CIFAR100 = Layout(
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    test=("test",),
    labels="fine_labels",
    classes=100,
)


def read(root: Path, layout: Layout, train: bool) -> ArrayImages:
    """The training or the test images, uint8 ``[N, 3, 32, 32]``.

    Args:
        root: holds the unpacked folder, or the archive as downloaded.
    """
    names = layout.train if train else layout.test
    pixels, labels = [], []
    for name, content in _contents(root, layout, names).items():
        batch = _unpickle(content, name, layout)
        rows, numbers = _checked(batch, name, layout)
        pixels.append(rows)
        labels.append(numbers)
    return ArrayImages(torch.cat(pixels), torch.cat(labels))


def _advice(layout: Layout) -> str:
    return f"get it again: {_HOME}{layout.archive}, unpacked to {layout.folder}/"


def _contents(root: Path, layout: Layout, names: tuple[str, ...]) -> dict[str, bytes]:
    """Bytes of each file, by its path, from the folder or else from the archive."""
    folder, archive = root / layout.folder, root / layout.archive
    if not folder.is_dir() and archive.is_file():
        return _unpack(archive, layout, names)
    if not folder.is_dir():
        raise ArgumentError(
            f"'{folder}' is missing, and so is {layout.archive} beside it; download "
            f"{_HOME}{layout.archive} to '{root}' or set data.root to where it is"
        )
    contents = {}
    for name in names:
        try:
            contents[str(folder / name)] = (folder / name).read_bytes()
        except OSError as error:
            raise ArgumentError(
                f"'{folder / name}' cannot be read ({error.strerror}); {_advice(layout)}"
            ) from error
    return contents


def _unpack(archive: Path, layout: Layout, names: tuple[str, ...]) -> dict[str, bytes]:
    wanted = {f"{layout.folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.size > MOST_BYTES:
                    raise ArgumentError(
                        f"archive '{archive}' holds a file of {member.size:,} bytes, more than any "
                        f"of {layout.archive}; {_advice(layout)}"
                    )
                if member.name in wanted and (file := tar.extractfile(member)) is not None:
                    found[wanted[member.name]] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ArgumentError(
            f"archive '{archive}' cannot be unpacked ({error}); {_advice(layout)}"
        ) from error
    for name in names:
        if name not in found:
            raise ArgumentError(
                f"archive '{archive}' holds no {layout.folder}/{name}; {_advice(layout)}"
            )
    return {f"{archive}:{name}": found[name] for name in names}


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, text, containers and NumPy arrays; a file can make it run nothing else."""

    _CORE = {("multiarray", "_reconstruct"), ("numeric", "_frombuffer")}
    _OTHERS = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 renamed numpy.core to numpy._core; files of either are read with either.
        package, _, inner = module.rpartition(".")
        if package in ("numpy.core", "numpy._core") and (inner, name) in self._CORE:
            return super().find_class(f"numpy.{_numpy_core()}.{inner}", name)
        if (module, name) in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images")


def _numpy_core() -> str:
    import numpy

    return "_core" if hasattr(numpy, "_core") else "core"


def _unpickle(content: bytes, name: str, layout: Layout) -> Any:
    try:
        # latin1 carries the bytes of Python 2's strings, in which the pixels are, as they are.
        return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except MemoryError:
        raise
    # A damaged pickle can make the unpickler raise nearly anything.
    except Exception as error:
        raise ArgumentError(f"'{name}' is damaged ({error}); {_advice(layout)}") from error


def _checked(batch: Any, name: str, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of one batch, if it is one."""
    import numpy

    values = batch if isinstance(batch, dict) else {}
    pixels, labels = values.get("data"), values.get(layout.labels)
    if (
        not isinstance(pixels, numpy.ndarray)
        or not isinstance(labels, list)
        or pixels.dtype != numpy.uint8
        or pixels.shape != (len(labels), math.prod(SHAPE))
        or not labels
        or not all(type(label) is int and 0 <= label < layout.classes for label in labels)
    ):
        raise ArgumentError(
            f"'{name}' is no batch of {layout.folder}: it must hold 'data', bytes [N, 3072], and "
            f"'{layout.labels}', N numbers below {layout.classes}; {_advice(layout)}"
        )
    rows = torch.from_numpy(numpy.ascontiguousarray(pixels)).view(-1, *SHAPE)
    return rows, torch.tensor(labels)
