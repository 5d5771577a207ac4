"""Subsets and held-out parts of a data set, balanced over its classes."""

import torch
from torch import Tensor

from polarfast.errors import ArgumentError

from .plan import mix

_SUBSET, _HELD_OUT = 1, 2  # each choice draws from numbers of its own


def _shuffled_classes(labels: Tensor, seed: int, purpose: int) -> list[Tensor]:
    """For each class, the indices of its images in a random order of their own."""
    each = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(mix(seed, purpose, label))
        each.append(members[torch.randperm(len(members), generator=generator)])
    return each


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
