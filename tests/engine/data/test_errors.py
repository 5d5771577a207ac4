"""What is said of data sets that are missing, bad or not what the settings ask for."""

import gzip
import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import epoch, opened
from support.image_sets import noise, write_cifar10, write_folder, write_mnist

from polarfast.engine.data.batches import as_stored
from polarfast.engine.data.decode import UnreadableImage, decode
from polarfast.engine.data.reading import read_parts
from polarfast.engine.data.settings import Data
from polarfast.errors import ArgumentError


def test_missing_files_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="data.root='.*nowhere': there is no such folder"):
        opened("cifar10", tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="cifar-10-batches-py.*https://.*cifar-10-python"):
        opened("cifar10", tmp_path)
    with pytest.raises(ArgumentError, match="train-images-idx3-ubyte.*download=True"):
        opened("mnist", tmp_path)
    with pytest.raises(ArgumentError, match="train' is missing.*train/<class>/<image>"):
        opened("folder", tmp_path)
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ArgumentError, match="data_batch_3' cannot be read.*get it again"):
        opened("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": noise(0, 4, 3072), "labels": [0, 1, 2]}),
        pickle.dumps({"data": noise(0, 1, 3072), "labels": [10]}),
        pickle.dumps({"data": noise(0, 1, 3072).astype(float), "labels": [1]}),
        pickle.dumps({"data": noise(0, 2, 3072), "labels": [0, 1]})[:-3000],
    ],
)
def test_damaged_cifar_batches(tmp_path: Path, content: bytes) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    with pytest.raises(ArgumentError, match="data_batch_2' is.*get it again"):
        opened("cifar10", tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def test_a_batch_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    content = pickle.dumps({"data": noise(0, 1, 3072), "labels": [0], "x": Evil()})
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    with pytest.raises(ArgumentError, match="mkdir has no place"):
        opened("cifar10", tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_damaged_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:1000])
    with pytest.raises(ArgumentError, match="idx3-ubyte.gz' cannot be unpacked.*get it again"):
        opened("mnist", tmp_path)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ArgumentError, match="idx3-ubyte.gz' is damaged"):
        opened("mnist", tmp_path)
    labels = images.with_name("train-labels-idx1-ubyte.gz")
    images.write_bytes(labels.read_bytes())
    with pytest.raises(ArgumentError, match="images-idx3-ubyte.gz' is damaged or not an IDX"):
        opened("mnist", tmp_path)
    images.write_bytes(whole)
    labels.write_bytes(images.with_name("t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(ArgumentError, match="40 images and .* 20 labels"):
        opened("mnist", tmp_path)


def test_folders_that_do_not_fit_together(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, test=0)
    with pytest.raises(ArgumentError, match="val' holds no image"):
        opened("folder", tmp_path)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(ArgumentError, match="without cat and with dog, not in train"):
        opened("folder", tmp_path)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match="neither.*data.validation"):
        opened("folder", tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ArgumentError, match="train/empty' holds no training image"):
        opened("folder", tmp_path)


def test_images_of_one_colour_cannot_be_normalized(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, test=1)
    for file in (tmp_path / "train").rglob("*.png"):
        Image.new("RGB", (12, 10)).save(file)
    with pytest.raises(ArgumentError, match="same value in every pixel"):
        opened("folder", tmp_path)


SUFFIXES = (".jpg", ".png")
BAD = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-200]),
    "empty": lambda file: file.write_bytes(b""),
    "no image": lambda file: file.write_bytes(b"<html>not found</html>"),
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("gone")),
    "damaged": lambda file: file.write_bytes(file.read_bytes()[:60] + b"\0" * 300),
}


WAYS = [
    *(
        (kind, keep, 0, suffix)
        for kind in BAD
        for keep in ("device", "stream")
        for suffix in SUFFIXES
    ),
    ("truncated", "stream", 2, ".jpg"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, keep, workers, suffix", WAYS)
def test_bad_images_are_named_or_skipped(
    tmp_path: Path,
    kind: str,
    keep: str,
    workers: int,
    suffix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_folder(tmp_path, train=6, test=4, suffix=suffix, size=(40, 30))
    bad = tmp_path / "train" / "bee" / f"003{suffix}"
    BAD[kind](bad)
    with pytest.raises(ArgumentError, match=f"003{suffix}' cannot be read.*skip-bad-images"):
        epoch(opened("folder", tmp_path, keep=keep, workers=workers), 18)
    bad_test = tmp_path / "val" / "ant" / f"001{suffix}"
    bad_test.write_bytes(b"\0")
    with caplog.at_level(logging.WARNING):
        source = opened("folder", tmp_path, keep=keep, workers=workers, skip_bad_images=True)
        first = epoch(source, 6)
        assert len(first[1]) == 6 * (source.train_size // 6)
        tested = sum(len(labels) for _, labels in source.test(5))
    assert torch.equal(epoch(source, 6)[0], first[0])
    assert tested == 11
    assert source.bad_images == 2
    assert len(caplog.records) == 1
    assert f"{suffix}' cannot be read" in caplog.text


def test_a_streamed_bad_image_is_replaced_alike_by_any_number_of_workers(tmp_path: Path) -> None:
    write_folder(tmp_path, train=4, test=1)
    for name in ("000", "001", "002"):
        (tmp_path / "train" / "ant" / f"{name}.png").write_bytes(b"")
    runs = [
        epoch(opened("folder", tmp_path, keep="stream", workers=workers, skip_bad_images=True), 12)
        for workers in (0, 2)
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, test=1)
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"")
    for keep in ("device", "stream"):
        with pytest.raises(ArgumentError, match="none of the 6 images can be read"):
            opened("folder", tmp_path, keep=keep, workers=0, skip_bad_images=True)


def test_a_class_of_bad_images_only(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, test=1)
    for file in (tmp_path / "train" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ArgumentError, match="no training image of class bee"):
        opened("folder", tmp_path, skip_bad_images=True)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, test=1)
    deep = Image.fromarray(noise(0, 10, 12).astype(np.uint16) * 257)
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    (tmp_path / "train" / "ant" / "001.png").write_bytes(buffer.getvalue())
    parts = read_parts(Data("folder", str(tmp_path)))
    with pytest.raises(UnreadableImage, match="001.png.*8 bits"):
        decode(parts.train, as_stored, (3, 10, 12), skip_bad=False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train_images": 19}, "train_images=19: there are 18 images"),
        ({"train_images": 2}, "train_images=2: fewer than the 3 classes"),
        ({"test_images": 10}, "test_images=10: there are 9 images"),
        ({"validation": 0.01}, "validation=0.01: class 0 has 6 training images"),
    ],
)
def test_counts_that_cannot_be(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_folder(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        opened("folder", tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "mnist", "shift": -1},
        {"name": "mnist", "validation": 1.0},
        {"name": "mnist", "augment": "shift"},
        {"name": "mnist", "shift": 1},
        {"name": "digits", "keep": "stream"},
        {"name": "digits", "augment": "resized-crop-flip"},
        {"name": "folder", "augment": "resized-crop-flip", "keep": "device"},
        {"name": "cifar10", "loader": "dali"},
        {"name": "folder", "loader": "dali", "keep": "device"},
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="data\\."):
        Data(**fields)
