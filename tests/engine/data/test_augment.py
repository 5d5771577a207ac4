"""How training images are varied, against images moved and mirrored pixel by pixel."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data import CPU, epoch
from support.image_sets import write_folder
from torch import Tensor

from polarfast.engine.data.batches import draw_moves, move
from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.settings import Data
from polarfast.engine.data.source import DataSource, load


def moved_ref(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """One image moved and mirrored, pixel by pixel."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                out[:, y, width - 1 - x if flip else x] = image[:, y - down, x - right]
    return out


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    pixels=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_moves_equal_a_slow_reference(
    count: int, shape: tuple[int, int, int], pixels: int, flip: bool, seed: int
) -> None:
    images = torch.randint(1, 256, (count, *shape), dtype=torch.uint8)
    moves = draw_moves(count, pixels, flip, seed)
    assert 0 <= int(moves.corners.min()) and int(moves.corners.max()) <= 2 * pixels
    out = move(images, pixels, moves)
    flipped = [False] * count if moves.flipped is None else moves.flipped.tolist()
    for row in range(count):
        down, right = (pixels - moves.corners[:, row]).tolist()
        assert torch.equal(out[row], moved_ref(images[row], down, right, flipped[row]))


def test_every_move_comes_up() -> None:
    images = torch.arange(1, 26).reshape(1, 1, 5, 5).expand(2000, 1, 5, 5)
    out = move(images, 2, draw_moves(2000, 2, True, 0))
    assert len({tuple(image.flatten().tolist()) for image in out}) == 50


@pytest.mark.parametrize("keep", ["device", "stream"])
@pytest.mark.parametrize("augment", ["shift", "crop-flip"])
def test_training_images_are_moved_ones(tmp_path: Path, keep: str, augment: str) -> None:
    write_folder(tmp_path, train=4, size=(7, 5))
    plain = load(Data("folder", str(tmp_path), keep="device"), CPU)
    varied = load(
        Data("folder", str(tmp_path), keep=keep, augment=augment, shift=1, workers=0), CPU
    )
    # Both sources undone to bytes, since border pixels are black before normalization.
    originals = to_bytes(plain, epoch(plain, seed=6, batch_size=12)[0])
    for seed in range(3):
        order = EpochPlan(seed=6, batch_size=12).order(12).argsort()
        by_name = originals[order][EpochPlan(seed=seed, batch_size=12).order(12)]
        out = to_bytes(varied, epoch(varied, seed=seed, batch_size=12)[0])
        flips = (False, True) if augment == "crop-flip" else (False,)
        for image, moved in zip(by_name, out, strict=True):
            candidates = [
                moved_ref(image, down, right, flip)
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                for flip in flips
            ]
            assert any(torch.equal(moved, candidate) for candidate in candidates)


def to_bytes(source: DataSource, images: Tensor) -> Tensor:
    normalize = source._normalize  # type: ignore[attr-defined]
    mean = torch.tensor(normalize.mean).view(-1, 1, 1)
    std = torch.tensor(normalize.std).view(-1, 1, 1)
    return (images * std + mean).round()
