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
            missing = _missing(rows, there, strength)
            if missing.numel():
                there[missing] = changed = True
                found += missing.tolist()
    return found


def _missing(rows: Tensor, there: Tensor, strength: Tensor) -> Tensor:
    """What must be added for as many in each row, the strongest first."""
    inside = there[rows]
    counts = inside.sum(1, keepdim=True)
    if bool((counts == counts[0]).all()):
        return rows.new_empty(0)
    strongest = strength[rows].masked_fill(inside, -torch.inf)
    order = strongest.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(rows.shape[1], device="cpu") < counts.max() - counts
    missing = rows.gather(1, order)[first]
    added = there.clone()
    added[missing] = True
    if bool((added[rows].sum(1) == counts.max()).all()):
        return missing
    return _one_by_one(rows, there.clone(), strength)  # a class is in several of these rows


def _one_by_one(rows: Tensor, there: Tensor, strength: Tensor) -> Tensor:
    found = []
    for row in rows:
        while int(there[row].sum()) < int(there[rows].sum(1).max()):
            gone = row[~there[row]]
            found.append(gone[strength[gone].argmax()])
            there[found[-1]] = True
    return torch.stack(found)


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
