"""Constant channels: one carries, in its own shape, what many removed channels leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .channels import Channels
from .fields import TOLERANCE, Fold, ReaderFold, level_of, put_interior, read_fields
from .inputs import Spec, device_of, generate
from .tracing import PIN, ProjectionCall


class Carriers:
    """Constant channels: for each set of layers that write the same channels, one removed channel
    that may stand for all.

    The masked network runs once more with β = 1 on these channels (on the first norm that writes
    it; the others' β is 0), which shows the shape in which each reader sees such a channel.
    """

    def __init__(
        self,
        masked: nn.Module,
        channels: Channels,
        alive: Tensor,
        wanted: dict[int, Tensor],
        spec: Spec,
    ) -> None:
        self.masked, self.channels, self.wanted = masked, channels, wanted
        self.carrier_of = carriers(channels, alive)
        with self._ones():
            inputs = generate(spec, device=device_of(masked), dtype=torch.float64, seed=1)
            self.unit = read_fields(masked, inputs, wanted, channels.graph.projections)

    @contextmanager
    def _ones(self) -> Iterator[None]:
        params: dict[str, Tensor] = dict(self.masked.named_parameters())
        saved: dict[str, Tensor] = {}
        first: set[int] = set()
        chosen = set(self.carrier_of.values())
        with torch.no_grad():
            for name, labels in self.channels.layers.items():
                norm = self.channels.calls[name]
                if norm.bias is None:
                    continue
                for tensor in (norm.weight, norm.bias, norm.gate):
                    if tensor is not None:
                        saved[tensor] = params[tensor].clone()
                for place, label in enumerate(labels.tolist()):
                    if label in chosen:
                        params[str(norm.weight)][place] = 0.0
                        params[norm.bias][place] = 0.0 if label in first else 1.0
                        if norm.gate is not None:
                            params[norm.gate][place] = 1.0
                first |= set(labels.tolist())
            yield
            for tensor, values in saved.items():
                params[tensor].copy_(values)

    def carry(
        self, result: Fold, index: int, seen: Tensor, again: Tensor, problem: str, refuse: bool
    ) -> None:
        """Let constant channels carry what one reader sees; where they cannot, or where that is to
        be refused, fold the interior value and say so.
        """
        call = self.channels.graph.projections[index]
        reader, positions = result.readers[index], self.wanted[index]
        labels = self.channels.label[call.inputs[positions]].tolist()
        level, varies = level_of(seen, again)
        refuse = refuse or varies == "depends on the input"
        left = torch.ones(positions.numel(), dtype=torch.bool, device="cpu")
        carried_by = torch.tensor(
            [self.carrier_of.get(label, -1) for label in labels], device="cpu"
        )
        for carrier in [] if refuse else carried_by.unique().tolist():
            mine = carried_by == carrier
            if carrier >= 0 and self._columns(reader, call, carrier, mine, labels, seen, index):
                left &= ~mine
                if bool((seen[:, mine] != 0).any()):
                    result.constant.add(carrier)
        if bool((seen[:, left] != 0).any()):
            note = f"{problem}; the interior value is folded"
            put_interior(self.masked, call, reader, positions[left], level[left], note)

    def _columns(
        self,
        reader: ReaderFold,
        call: ProjectionCall,
        carrier: int,
        mine: Tensor,
        labels: list[int],
        seen: Tensor,
        index: int,
    ) -> bool:
        """Express the fields of the channels that share a carrier as multiples of its field; False
        if they are not.
        """
        positions, unit = self.wanted[index], self.unit[index]
        group_of = positions // (call.inputs.numel() // call.groups)
        columns: dict[int, tuple[Tensor, Tensor]] = {}
        for group in group_of[mine].unique().tolist():
            members = (mine & (group_of == group)).nonzero().flatten()
            places = [k for k in members.tolist() if labels[k] == carrier]
            if not places:
                return False
            shape = unit[:, places[0]].flatten()
            fields = seen[:, members].transpose(0, 1).flatten(1)
            power = float(shape @ shape)
            multiple = fields @ shape / (power or 1.0)  # a carrier nobody sees carries nothing
            error = (fields - multiple.unsqueeze(1) * shape).abs()
            if bool((error > TOLERANCE * fields.abs().max()).any()):
                return False
            columns[int(positions[places[0]])] = (positions[members], multiple)
        reader.columns.update(columns)
        return True


def carriers(channels: Channels, alive: Tensor) -> dict[int, int]:
    """Removed class -> the removed class that can carry its constant: the first that the same
    layers write. Left out are classes that a norm without bias writes.
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
    first: dict[tuple[str, ...], int] = {}
    return {
        label: first.setdefault(names, label)
        for label, names in sorted(writers.items())
        if label not in fixed
    }
