"""Groups of a convolution stay equal in size, and so do chunks: what has to come back for that."""

from collections.abc import Sequence, Set

import torch
from torch import Tensor


def to_restore(
    balanced: Sequence[Tensor], stays: Tensor, strength: Tensor, constant: Set[int] = frozenset()
) -> list[int]:
    """Removed classes to add back, the strongest first, until as many stay in each row.

    Args:
        balanced: class labels [P, m] each: as many must stay in each of the P rows.
        stays: bool, by class.
        strength: float, by class.
        constant: classes of constant channels, which count as staying.
    """
    there = stays.clone()
    there[list(constant)] = True
    found: list[int] = []
    changed = bool(balanced)
    while changed:  # a class may be in several rows, and in rows of others
        changed = False
        for rows in balanced:
            counts = there[rows].sum(1)
            for row in rows[counts < counts.max()]:
                while int(there[row].sum()) < int(there[rows].sum(1).max()):
                    gone = row[~there[row]]
                    label = int(gone[strength[gone].argmax()])
                    there[label] = changed = True
                    found.append(label)
    return found


def spare(balanced: Sequence[Tensor], stays: Tensor, useless: Tensor) -> None:
    """Leave out of `useless` (bool, by class; in place) what would have to come back, because
    others of its rows stay.
    """
    changed = True
    while changed:
        changed = False
        for rows in balanced:
            mine = rows[stays[rows]]
            if bool(useless[mine].any()) and not bool(useless[mine].all()):
                useless[mine] = False
                changed = True


def is_balanced(rows: Tensor, stays: Tensor) -> bool:
    """Whether as many classes stay in each row."""
    counts = stays[rows].sum(1)
    return bool(torch.equal(counts, counts[:1].expand_as(counts)))
