"""Epochs: which image goes where, and that nothing else has a say in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.data import CPU, epoch, same
from support.image_sets import write_folder

from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.settings import Data
from polarfast.engine.data.source import DataSource, load
from polarfast.errors import ArgumentError, PolarfastError


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
