"""Epochs: which image goes where, how it is varied, and that nothing else has a say in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import write_cifar10, write_folder
from sklearn.datasets import load_digits
from torch import Tensor

from polarfast.engine.data import Data, DataSource, EpochPlan, load
from polarfast.engine.data.augment import draw_moves, move
from polarfast.engine.data.plan import mix
from polarfast.engine.data.sharing import rank_share
from polarfast.engine.data.splits import balanced_subset, hold_out
from polarfast.errors import ArgumentError, PolarfastError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["digits", "kept", "streamed", "workers"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DataSource]:
    if request.param == "digits":
        yield load(Data("digits", augment="shift", shift=2), CPU)
        return
    root = tmp_path_factory.mktemp("images")
    write_folder(root, train=20, test=7)
    keep = "device" if request.param == "kept" else "stream"
    workers = 2 if request.param == "workers" else 0
    settings = Data("folder", str(root), augment="crop-flip", keep=keep, workers=workers)
    yield load(settings, CPU)


def epoch(source: DataSource, **plan: int) -> tuple[Tensor, Tensor]:
    batches = list(source.train(EpochPlan(**plan)))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_shards_of_any_cut_hold_the_same_images(source: DataSource) -> None:
    whole = epoch(source, seed=3, batch_size=8)
    steps = source.train_size // 8
    assert len(whole[1]) == 8 * steps
    for processes in (1, 2, 4):
        accumulation = 4 // processes
        parts = [
            list(
                source.train(
                    EpochPlan(
                        seed=3,
                        batch_size=8,
                        shards=4,
                        first_shard=rank * accumulation,
                        shard_count=accumulation,
                    )
                )
            )
            for rank in range(processes)
        ]
        assert [len(part) for part in parts] == [steps * accumulation] * processes
        ordered = [
            parts[rank][step * accumulation + micro]
            for step in range(steps)
            for rank in range(processes)
            for micro in range(accumulation)
        ]
        assert [images.shape[0] for images, _ in ordered] == [2] * (4 * steps)
        joined = torch.cat([b[0] for b in ordered]), torch.cat([b[1] for b in ordered])
        assert same(joined, whole)


def test_an_epoch_goes_on_from_any_step(source: DataSource) -> None:
    images, labels = epoch(source, seed=5, batch_size=10)
    steps = source.train_size // 10
    for start in (1, steps - 1):
        rest = epoch(source, seed=5, batch_size=10, start_step=start)
        assert same(rest, (images[10 * start :], labels[10 * start :]))
    assert list(source.train(EpochPlan(seed=5, batch_size=10, start_step=steps))) == []
    with pytest.raises(ArgumentError, match=f"start_step={steps + 1}.*{steps} steps"):
        source.train(EpochPlan(seed=5, batch_size=10, start_step=steps + 1))


def test_seed_decides_and_nothing_else(source: DataSource) -> None:
    first = epoch(source, seed=1, batch_size=20)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(epoch(source, seed=1, batch_size=20), first)
    assert torch.equal(torch.get_rng_state(), before)
    other = epoch(source, seed=2, batch_size=20)
    assert not torch.equal(other[1], first[1])
    assert torch.equal(other[1].bincount(), first[1].bincount())


def test_same_images_vary_otherwise_in_another_epoch(source: DataSource) -> None:
    count = source.train_size
    sums = [
        epoch(source, seed=seed, batch_size=count)[0].flatten(1).double().sum(1).sort().values
        for seed in (1, 2)
    ]
    assert not torch.equal(*sums)


def test_batches_are_float_images_and_labels(source: DataSource) -> None:
    images, labels = next(source.train(EpochPlan(seed=0, batch_size=6, shards=2)))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.shape == (3, *source.image_shape) and labels.shape == (3,)
    assert int(labels.max()) < source.classes


def test_test_images_come_once_over_all_ranks(source: DataSource) -> None:
    whole = list(source.test(1000))
    assert [len(labels) for _, labels in whole] == [source.test_size]
    for world in (1, 2, 3):
        parts = [batch for rank in range(world) for batch in source.test(4, rank=rank, world=world)]
        joined = torch.cat([b[0] for b in parts]), torch.cat([b[1] for b in parts])
        assert same(joined, whole[0])


def test_example_is_the_first_test_images(source: DataSource) -> None:
    images, _ = next(source.test(5))
    assert torch.equal(source.example(5), images)
    assert source.example().shape == (1, *source.image_shape)


def test_batch_larger_than_the_set(source: DataSource) -> None:
    size = source.train_size + 1
    with pytest.raises(ArgumentError, match=f"batch_size={size}: larger"):
        source.train(EpochPlan(seed=0, batch_size=size))


def test_streamed_and_kept_images_are_the_same_before_variation(tmp_path: Path) -> None:
    write_folder(tmp_path, suffix=".jpg", size=(64, 70))
    kept, streamed, spread = (
        load(Data("folder", str(tmp_path), keep=keep, workers=workers), CPU)
        for keep, workers in (("device", 0), ("stream", 0), ("stream", 3))
    )
    first = epoch(kept, seed=4, batch_size=6)
    assert same(epoch(streamed, seed=4, batch_size=6), first)
    assert same(epoch(spread, seed=4, batch_size=6), first)
    assert torch.equal(next(kept.test(9))[0], next(streamed.test(9))[0])


def test_workers_change_nothing_of_a_resized_crop(tmp_path: Path) -> None:
    write_folder(tmp_path, suffix=".jpg", size=(40, 30))
    runs = [
        epoch(
            load(
                Data(
                    "folder",
                    str(tmp_path),
                    augment="resized-crop-flip",
                    image_size=16,
                    workers=workers,
                ),
                CPU,
            ),
            seed=8,
            batch_size=6,
        )
        for workers in (0, 1, 3)
    ]
    assert runs[0][0].shape == (18, 3, 16, 16)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_streamed_images_lie_channels_last(tmp_path: Path) -> None:
    write_folder(tmp_path, suffix=".jpg")
    source = load(Data("folder", str(tmp_path), keep="stream", workers=0), CPU)
    images, _ = next(source.train(EpochPlan(seed=0, batch_size=4)))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_given_up_is_not_mixed_with_the_next(tmp_path: Path) -> None:
    write_folder(tmp_path)
    source = load(Data("folder", str(tmp_path), keep="stream", workers=1), CPU)
    whole = epoch(source, seed=0, batch_size=3)
    old = source.train(EpochPlan(seed=7, batch_size=3))
    next(old)
    assert same(epoch(source, seed=0, batch_size=3), whole)
    with pytest.raises(PolarfastError, match="given up"):
        next(old)


# --- augmentation -------------------------------------------------------------------------------


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


# --- plans, splits, shares ----------------------------------------------------------------------


def test_mix_depends_on_every_number_and_their_order() -> None:
    values = {mix(a, b) for a in range(50) for b in range(50)}
    assert len(values) == 2500
    assert all(0 <= value < 2**63 for value in values)
    # SplitMix64 with seed 0 starts with 0xE220A8397B1DCDAF (Vigna's reference code).
    assert mix(0) == 0xE220A8397B1DCDAF >> 1


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"batch_size": 6, "shards": 4},
        {"batch_size": 8, "shards": 4, "first_shard": 3, "shard_count": 2},
        {"batch_size": 8, "shards": 0},
        {"batch_size": 8, "start_step": -1},
    ],
)
def test_plans_that_cannot_be(fields: dict[str, int]) -> None:
    with pytest.raises(ArgumentError):
        EpochPlan(seed=0, **fields)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(0, 9), st.data())
def test_balanced_subsets(labels: list[int], seed: int, data: st.DataObject) -> None:
    numbers = torch.tensor(labels)
    count = data.draw(st.integers(1, len(labels)))
    chosen = balanced_subset(numbers, count, seed, "train_images")
    assert len(set(chosen.tolist())) == count == len(chosen)
    counts = numbers[chosen].bincount(minlength=5)
    have = numbers.bincount(minlength=5)
    # Nobody who has images left is more than one behind the others.
    behind = counts < have
    assert not behind.any() or int(counts.max()) - int(counts[behind].min()) <= 1
    smaller = balanced_subset(numbers, count - 1, seed, "x") if count > 1 else chosen
    assert set(smaller.tolist()) <= set(chosen.tolist())


@settings(deadline=None)
@given(st.integers(2, 12), st.floats(0.3, 0.7), st.integers(0, 9))
def test_held_out_images_are_a_share_of_each_class(each: int, share: float, seed: int) -> None:
    labels = torch.arange(3).repeat(each)
    staying, held = hold_out(labels, share, seed)
    assert sorted([*staying.tolist(), *held.tolist()]) == list(range(3 * each))
    assert labels[held].bincount().tolist() == [round(share * each)] * 3


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 7))
def test_shares_are_all_images_once(images: int, batch_size: int, world: int) -> None:
    shares = [rank_share(images, batch_size, rank, world) for rank in range(world)]
    rows = [row for share in shares for part in share for row in range(part.start, part.stop)]
    assert rows == list(range(images))
    sizes = [sum(part.stop - part.start for part in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_validation_takes_the_place_of_the_test_set(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    whole = load(Data("cifar10", str(tmp_path), validation=0.2), CPU)
    assert (whole.train_size, whole.test_size) == (80, 20)
    few = load(Data("cifar10", str(tmp_path), validation=0.2, train_images=30), CPU)
    held, labels = next(whole.test(100))
    assert labels.bincount().tolist() == [2] * 10
    assert torch.equal(next(few.test(100))[0], held)  # whatever is left to train on
    trained = epoch(whole, seed=0, batch_size=80)[0]
    together = torch.cat([trained, held]).flatten(1)
    assert len(together.unique(dim=0)) == 100
    subset = epoch(few, seed=0, batch_size=30)
    assert subset[1].bincount().tolist() == [3] * 10


# --- digits -------------------------------------------------------------------------------------


def test_digits_split_is_all_images_once() -> None:
    digits = load(Data("digits"), CPU)
    assert (digits.train_size, digits.test_size, digits.classes) == (1000, 797, 10)
    assert digits.image_shape == (1, 16, 16)
    images, labels = epoch(digits, seed=0, batch_size=1000)
    tested = next(digits.test(797))
    every = torch.cat([labels, tested[1]])
    assert every.bincount().tolist() == torch.from_numpy(load_digits().target).bincount().tolist()
    # A handful of the bundled images may be alike, but the split repeats none.
    bundled = torch.from_numpy(load_digits().images).flatten(1).unique(dim=0)
    assert len(torch.cat([images, tested[0]]).flatten(1).unique(dim=0)) == len(bundled)
    assert images.mean().abs() < 1e-4
    assert abs(float(images.std()) - 1) < 1e-4


def test_split_seed_changes_the_split_and_only_it() -> None:
    first, again, other = (load(Data("digits", split_seed=seed), CPU) for seed in (0, 0, 1))
    assert torch.equal(first.example(797), again.example(797))
    assert not torch.equal(first.example(797), other.example(797))
