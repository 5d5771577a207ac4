"""Digits: the split, the shifts, the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from polarfast.engine import data
from polarfast.errors import ArgumentError

CPU = torch.device("cpu")


def shifted_ref(image: Tensor, down: int, right: int, fill: float) -> Tensor:
    """One image moved, pixel by pixel."""
    out = torch.full_like(image, fill)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                out[:, y, x] = image[:, y - down, x - right]
    return out


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)
)
def test_random_shift_moves_each_image(
    count: int, channels: int, height: int, width: int, pixels: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, channels, height, width, generator=generator)
    out = data.random_shift(images, pixels, -7.0, generator)
    assert out.shape == images.shape
    moves = range(-pixels, pixels + 1)
    for image, moved in zip(images, out, strict=True):
        candidates = (shifted_ref(image, down, right, -7.0) for down in moves for right in moves)
        assert any(torch.equal(moved, candidate) for candidate in candidates)


def test_every_shift_comes_up() -> None:
    images = torch.arange(25.0).reshape(1, 1, 5, 5).expand(400, 1, 5, 5)
    out = data.random_shift(images, 2, -1.0, torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten().tolist()) for image in out}) == 25


def test_digits_split_is_all_images_once() -> None:
    digits = data.digits(CPU)
    assert (len(digits.train), len(digits.test)) == (1000, 797)
    assert digits.image_shape == (1, 16, 16)
    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert (
        torch.bincount(labels).tolist()
        == torch.bincount(torch.from_numpy(load_digits().target)).tolist()
    )
    images = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    # A handful of the bundled images may be alike, but the split repeats none.
    assert len(images.unique(dim=0)) == len(
        torch.from_numpy(load_digits().images).flatten(1).unique(dim=0)
    )


def test_digits_are_normalized_by_the_training_images_alone() -> None:
    digits = data.digits(CPU)
    assert digits.train.images.mean().abs() < 1e-4
    assert abs(float(digits.train.images.std()) - 1) < 1e-4
    assert digits.background == pytest.approx(float(digits.train.images.min()))


def test_test_seed_changes_the_split_and_only_it() -> None:
    first, again, other = data.digits(CPU), data.digits(CPU), data.digits(CPU, test_seed=1)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.labels, other.train.labels)


def test_batches_are_an_epoch_in_an_order_of_their_own() -> None:
    digits = data.digits(CPU)
    generator = torch.Generator().manual_seed(0)
    epochs = [
        torch.cat([labels for _, labels in data.batches(digits, 300, 0, generator)])
        for _ in range(2)
    ]
    assert [len(epoch) for epoch in epochs] == [900, 900]
    assert not torch.equal(*epochs)
    replay = data.batches(digits, 300, 0, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([labels for _, labels in replay]), epochs[0])


def test_unknown_data_set() -> None:
    with pytest.raises(ArgumentError, match="'imagenet'.*digits"):
        data.load("imagenet", CPU)
