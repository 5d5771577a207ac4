"""Tiny data sets in the formats that the real ones have on disk."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, *shape: int) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_cifar10(root: Path, per_batch: int = 20, protocol: int = 2) -> np.ndarray:
    """Six pickled batches; the training pixels [N, 3072] in order. Labels run 0, 1, ... 9, 0 ..."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = []
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels = noise(number, per_batch, 3072)
        labels = [n % 10 for n in range(per_batch)]
        content = {"batch_label": name, "labels": labels, "data": pixels, "filenames": ["x.png"]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
        batches.append(pixels)
    return np.concatenate(batches[:5])


def write_cifar100(root: Path, train: int = 200, test: int = 100) -> None:
    """A training and a test batch with fine and coarse labels."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        fine = [n % 100 for n in range(count)]
        content = {
            "fine_labels": fine,
            "coarse_labels": [n % 20 for n in fine],
            "data": noise(count, count, 3072),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_mnist(root: Path, folder: str = "MNIST", train: int = 40, packed: bool = True) -> None:
    """Four IDX files, gzipped or plain; half as many test images as training images."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", train // 2)):
        pixels = noise(count, count, 28, 28)
        images = struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 0x801, count) + bytes(n % 10 for n in range(count))
        for name, content in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            if packed:
                (raw / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (raw / f"{name}-ubyte").write_bytes(content)


def write_folder(
    root: Path,
    train: int = 6,
    test: int = 3,
    classes: tuple[str, ...] = ("ant", "bee", "cat"),
    size: tuple[int, int] = (12, 10),
    suffix: str = ".png",
    test_name: str = "val",
) -> None:
    """Image files of ``size`` (width, height), each of noise of its own."""
    seed = 0
    for part, count in (("train", train), (test_name, test)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise(seed, size[1], size[0], 3)
                Image.fromarray(pixels).save(folder / f"{number:03}{suffix}")
                seed += 1
