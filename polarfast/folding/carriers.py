"""Constant channels: one carries, in its own shape, what many removed channels leave behind."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..tracing.classes import Channels
from ..tracing.graph import PIN, ProjectionCall
from .replay import TOLERANCE, Field, ReaderFold

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


class Carriers:
    """For each set of layers that write the same channels, one removed channel that may stand for
    all.

    Args:
        channels: the network's channel classes.
        alive: bool [graph.count], without constant channels.
    """

    def __init__(self, channels: Channels, alive: Tensor) -> None:
        self.channels = channels
        self.carrier_of = carriers(channels, alive)

    @contextmanager
    def shown(self, params: dict[str, Tensor]) -> Iterator[None]:
        """Put β = 1 on these channels, on the first norm that writes them (the others' β is 0): a
        run then shows the shape in which each reader sees such a channel.

        Args:
            params: parameters of a masked network by name, changed in place meanwhile.
        """
        saved: dict[str, Tensor] = {}
        first: set[int] = set()
        chosen = set(self.carrier_of.values())
        with torch.no_grad():
            for name, labels in self.channels.layers.items():
                norm = self.channels.calls[name]
                if norm.bias is None:
                    continue
                mine = [(k, label) for k, label in enumerate(labels.tolist()) if label in chosen]
                if not mine:
                    continue
                for tensor in (norm.weight, norm.bias, norm.gate):
                    if tensor is not None and tensor not in saved:
                        saved[tensor] = params[tensor].clone()
                for place, label in mine:
                    params[str(norm.weight)][place] = 0.0
                    params[norm.bias][place] = 0.0 if label in first else 1.0
                    if norm.gate is not None:
                        params[norm.gate][place] = 1.0
                first.update(label for _, label in mine)
            yield
            for tensor, values in saved.items():
                params[tensor].copy_(values)

    def carry(
        self, reader: ReaderFold, call: ProjectionCall, positions: Tensor, seen: Field, unit: Field
    ) -> tuple[set[int], Tensor]:
        """Let constant channels carry what one reader sees.

        Args:
            reader: its fold, which gets columns.
            call: the reader.
            positions: the removed channels that it reads.
            seen: what it sees in these.
            unit: what it sees in them while carriers are shown.

        Returns:
            The carriers that it needs, and bool [R]: what they do not carry.
        """
        labels = self.channels.label[call.inputs[positions]].tolist()
        left = torch.ones(positions.numel(), dtype=torch.bool, device="cpu")
        carried_by = torch.tensor(
            [self.carrier_of.get(label, -1) for label in labels], device="cpu"
        )
        needed: set[int] = set()
        for carrier in carried_by.unique().tolist():
            mine = carried_by == carrier
            if carrier < 0:
                continue
            columns = _columns(call, positions, carrier, mine, labels, seen, unit)
            if columns is not None:
                reader.columns.update(columns)
                left &= ~mine
                if bool(seen.values[mine].any()):
                    needed.add(carrier)
        return needed, left & (seen.values != 0).any(1)


def _columns(
    call: ProjectionCall,
    positions: Tensor,
    carrier: int,
    mine: Tensor,
    labels: list[int],
    seen: Field,
    unit: Field,
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """The fields of the channels that share a carrier as multiples of its field; None if they are
    not.
    """
    group_of = positions // (call.inputs.numel() // call.groups)
    places = max(seen.values.shape[1], unit.values.shape[1])
    columns: dict[int, tuple[Tensor, Tensor]] = {}
    for group in group_of[mine].unique().tolist():
        members = (mine & (group_of == group)).nonzero().flatten()
        standing = [k for k in members.tolist() if labels[k] == carrier]
        if not standing:
            return None
        shape = unit.values[standing[0]].expand(places)
        fields = seen.values[members].expand(-1, places)
        power = float(shape @ shape)
        multiple = fields @ shape / (power or 1.0)  # a carrier nobody sees carries nothing
        error = (fields - multiple.unsqueeze(1) * shape).abs()
        if bool((error > TOLERANCE * fields.abs().max()).any()):
            return None
        columns[int(positions[standing[0]])] = (positions[members], multiple)
    return columns
