"""Which images are trained on, and the order in which an epoch sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArgumentError

_SUBSET, _HELD_OUT = 1, 2  # each choice draws from numbers of its own

WORD = (1 << 64) - 1


@dataclass(frozen=True)
class EpochPlan:
    """One process's part of one epoch.

    What a shard of a step holds depends on ``seed``, ``batch_size``, ``shards``, the step and the
    shard; not on which process computes it, nor on the step at which the epoch was taken up.

    Attributes:
        seed: of the order and the augmentation; another for each stage and epoch.
        batch_size: images of one optimizer step over all processes.
        shards: equal parts that this batch is cut into: processes times accumulation.
        first_shard, shard_count: this process computes shards ``first_shard`` to
            ``first_shard + shard_count - 1``.
        start_step: first step to compute, to go on in the middle of an epoch.
    """

    seed: int
    batch_size: int
    shards: int = 1
    first_shard: int = 0
    shard_count: int = 1
    start_step: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shards < 1 or self.batch_size % self.shards:
            raise ArgumentError(
                f"batch_size={self.batch_size}: must be a positive multiple of the {self.shards} "
                "shards (processes times accumulation) it is cut into"
            )
        last = self.first_shard + self.shard_count
        if self.first_shard < 0 or self.shard_count < 1 or last > self.shards:
            raise ArgumentError(
                f"first_shard={self.first_shard}, shard_count={self.shard_count}: must lie within "
                f"the {self.shards} shards"
            )
        if self.start_step < 0:
            raise ArgumentError(f"start_step={self.start_step}: must not be negative")

    def steps(self, images: int) -> int:
        """Optimizer steps of an epoch over so many images; what fills no batch is left out."""
        return images // self.batch_size

    def check(self, images: int) -> None:
        """Refuse an epoch without a step, or taken up after its end."""
        steps = self.steps(images)
        if steps == 0:
            raise ArgumentError(
                f"batch_size={self.batch_size}: larger than the {images} training images"
            )
        if self.start_step > steps:
            raise ArgumentError(
                f"start_step={self.start_step}: the epoch has {steps} steps of {self.batch_size} "
                f"of the {images} training images; was the run begun with other settings?"
            )

    def order(self, images: int) -> Tensor:
        """The epoch's permutation, int64 ``[images]`` on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(mix(self.seed))
        return torch.randperm(images, generator=generator)

    def micro_batches(self, images: int) -> Iterator[tuple[int, int, int, int]]:
        """This process's ``(step, shard, start, stop)``: rows ``start:stop`` of the order."""
        size = self.batch_size // self.shards
        for step in range(self.start_step, self.steps(images)):
            for shard in range(self.first_shard, self.first_shard + self.shard_count):
                start = step * self.batch_size + shard * size
                yield step, shard, start, start + size


def balanced_subset(labels: Tensor, count: int, seed: int, setting: str) -> Tensor:
    """Indices of ``count`` images, the same number of each class as far as there are enough.

    Images are dealt out in rounds, one of each class, so the choice of fewer images is part of the
    choice of more.

    Args:
        labels: int64 ``[N]``, every class from 0 on.
        count: 0 takes all.
        setting: name of the setting that asks for ``count``, for the message.

    Returns:
        int64 ``[count]``, ascending.
    """
    if count > len(labels):
        raise ArgumentError(f"{setting}={count}: there are {len(labels)} images")
    if count == 0:
        return torch.arange(len(labels))
    classes = _shuffled_classes(labels, seed, _SUBSET)
    generator = torch.Generator().manual_seed(mix(seed, _SUBSET))
    turn = torch.randperm(len(classes), generator=generator)  # who is left out of the last round
    indices = torch.cat([classes[label] for label in turn])
    rounds = torch.cat([torch.arange(len(classes[label])) for label in turn])
    dealt = indices[torch.argsort(rounds, stable=True)]
    return dealt[:count].sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images that stay and of those held out, ``share`` of each class.

    Returns:
        Two int64 tensors, ascending, without an index in common.
    """
    staying, held = [], []
    for label, members in enumerate(_shuffled_classes(labels, seed, _HELD_OUT)):
        count = round(share * len(members))
        if not 0 < count < len(members):
            raise ArgumentError(
                f"data.validation={share}: class {label} has {len(members)} training images, so "
                f"{count} would be held out and {len(members) - count} stay; both need one at least"
            )
        held.append(members[:count])
        staying.append(members[count:])
    return torch.cat(staying).sort().values, torch.cat(held).sort().values


def _shuffled_classes(labels: Tensor, seed: int, purpose: int) -> list[Tensor]:
    """For each class, the indices of its images in a random order of their own."""
    each = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(mix(seed, purpose, label))
        each.append(members[torch.randperm(len(members), generator=generator)])
    return each


def mix(*numbers: int) -> int:
    """A 63-bit integer that depends on every bit of ``numbers`` and on their order.

    Neighbouring seeds and positions give unrelated values, the same ones in every process and
    version of Python.
    """
    state = 0
    for number in numbers:
        state = splitmix(state + (number & WORD))
    return state >> 1


def splitmix(state: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014), of which every bit depends on every bit."""
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)
