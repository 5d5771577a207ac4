"""Plans, subsets, held-out images and shares: every image where it belongs, and only there."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from support.data import CPU, epoch
from support.image_sets import write_cifar10

from polarfast.engine.data.memory import rank_share
from polarfast.engine.data.plan import EpochPlan, balanced_subset, hold_out, mix
from polarfast.engine.data.settings import Data
from polarfast.engine.data.source import load
from polarfast.errors import ArgumentError


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


@pytest.mark.slow
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


@pytest.mark.slow
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
