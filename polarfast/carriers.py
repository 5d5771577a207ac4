"""Which removed channels may stand for which others, as constant channels."""

from collections.abc import Iterable

from torch import Tensor

from .channels import Channels
from .tracing import PIN

Place = frozenset[tuple[int, int]]  # (index into `Channels.balanced`, row)


def carriers(channels: Channels, alive: Tensor) -> dict[int, int]:
    """Removed class -> the removed class that can carry its constant: the first that the same
    layers write and that lies in the same groups and chunks. Left out are classes that a norm
    without bias writes.
    """
    writers: dict[int, tuple[str, ...]] = {}
    fixed: set[int] = {PIN}
    for name, labels in channels.layers.items():
        norm = channels.calls[name]
        removed = labels[~alive[norm.inputs]].unique().tolist()
        if norm.bias is None:
            fixed.update(removed)
        elif name not in channels.boundaries:
            for label in removed:
                writers[label] = (*writers.get(label, ()), name)
    place = _places(channels, writers)
    first: dict[tuple[tuple[str, ...], Place], int] = {}
    return {
        label: first.setdefault((names, place[label]), label)
        for label, names in sorted(writers.items())
        if label not in fixed
    }


def _places(channels: Channels, labels: Iterable[int]) -> dict[int, Place]:
    """In which rows of what must be balanced each class lies."""
    found: dict[int, set[tuple[int, int]]] = {label: set() for label in labels}
    for i, rows in enumerate(channels.balanced):
        for j, row in enumerate(rows.tolist()):
            for label in row:
                if label in found:
                    found[label].add((i, j))
    return {label: frozenset(places) for label, places in found.items()}
