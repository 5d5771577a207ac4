"""The DALI loader: same crops as the torch loader, where DALI is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_sets import write_folder
from torch import Tensor

from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.settings import Data
from polarfast.engine.data.source import DataSource, load
from polarfast.errors import ArgumentError

CPU = torch.device("cpu")
HAS_NVIDIA = importlib.util.find_spec("nvidia") is not None
HAS_DALI = HAS_NVIDIA and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")


def smooth_folder(root: Path) -> None:
    """Images without fine detail, which two decoders and resizers treat alike."""
    write_folder(root, train=8, test=5, size=(90, 70), suffix=".jpg")
    for number, file in enumerate(sorted(root.rglob("*.jpg"))):
        y, x = np.mgrid[0:70, 0:90]
        waves = [np.sin(x / (9 + number) + c) + np.cos(y / (11 + number)) for c in range(3)]
        pixels = (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)
        Image.fromarray(pixels).save(file, quality=95)


def opened(root: Path, loader: str, **fields: Any) -> DataSource:
    settings = {"augment": "resized-crop-flip", "image_size": 32, "workers": 0, **fields}
    return load(Data("folder", str(root), loader=loader, **settings), CPU)  # type: ignore[arg-type]


def epoch(source: DataSource, **plan: int) -> tuple[Tensor, Tensor]:
    batches = list(source.train(EpochPlan(seed=3, **plan)))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


@needs_dali
@pytest.mark.parametrize("augment", ["resized-crop-flip", "none"])
def test_crops_are_those_of_the_torch_loader(tmp_path: Path, augment: str) -> None:
    smooth_folder(tmp_path)
    theirs, ours = (
        opened(tmp_path, loader, augment=augment, keep="stream") for loader in ("dali", "torch")
    )
    for first, second in (
        (epoch(theirs, batch_size=8), epoch(ours, batch_size=8)),
        (next(theirs.test(15)), next(ours.test(15))),
    ):
        assert torch.equal(first[1], second[1])
        # A wrong crop or mirror is off by 0.3 and more; rounding of windows by a few levels.
        errors = (first[0] - second[0]).abs().flatten(1).mean(1) * 0.226
        assert float(errors.max()) < 0.02


@needs_dali
def test_epochs_go_on_and_shards_agree(tmp_path: Path) -> None:
    smooth_folder(tmp_path)
    source = opened(tmp_path, "dali", workers=2)
    images, labels = epoch(source, batch_size=8)
    assert len(labels) == 24
    rest = epoch(source, batch_size=8, start_step=1)
    assert torch.equal(rest[0], images[8:]) and torch.equal(rest[1], labels[8:])
    shards = [epoch(source, batch_size=8, shards=2, first_shard=rank)[0] for rank in (0, 1)]
    joined = torch.stack([shard.view(3, 4, 3, 32, 32) for shard in shards], dim=1)
    assert torch.equal(joined.flatten(0, 2), images)
    next(source.train(EpochPlan(seed=9, batch_size=4)))  # given up
    assert torch.equal(epoch(source, batch_size=8)[0], images)
    tested = [len(part[1]) for rank in (0, 1) for part in source.test(4, rank=rank, world=2)]
    assert tested == [4, 3, 4, 4]


@needs_dali
@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_bad_images_are_named(tmp_path: Path, content: bytes | None) -> None:
    smooth_folder(tmp_path)
    bad = tmp_path / "train" / "bee" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:900] if content is None else content)
    with pytest.raises(ArgumentError, match="bee/003.jpg' cannot be read"):
        epoch(opened(tmp_path, "dali"), batch_size=8)


@pytest.mark.skipif(HAS_DALI, reason="NVIDIA DALI is installed")
def test_dali_that_is_missing(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(ArgumentError, match="pip install nvidia-dali-cuda120"):
        opened(tmp_path, "dali")


@pytest.mark.parametrize(
    "fields",
    [
        {"augment": "crop-flip"},
        {"augment": "none", "image_size": 0},
        {"keep": "device", "augment": "none"},
        {"skip_bad_images": True},
    ],
)
def test_settings_that_do_not_go_with_dali(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="data.loader=dali"):
        opened(tmp_path, "dali", **fields)
