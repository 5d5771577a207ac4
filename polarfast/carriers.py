"""Constant channels: one carries, in its own shape, what many removed channels leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .channels import Channels
from .fields import TOLERANCE, Fold, ReaderFold, level_of, read_fields, shift
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
                bias = params[str(self.channels.calls[name].bias)]
                saved[name] = bias.clone()
                for place, label in enumerate(labels.tolist()):
                    if label in chosen:
                        bias[place] = 0.0 if label in first else 1.0
                first |= set(labels.tolist())
            yield
            for name, bias in saved.items():
                params[str(self.channels.calls[name].bias)].copy_(bias)

    def carry(self, result: Fold, index: int, seen: Tensor, again: Tensor, problem: str) -> None:
        """Let constant channels carry what one reader sees; where they cannot, fold the interior
        value and say so.
        """
        call = self.channels.graph.projections[index]
        reader, positions = result.readers[index], self.wanted[index]
        labels = self.channels.label[call.inputs[positions]].tolist()
        level, varies = level_of(seen, again)
        left = torch.ones(positions.numel(), dtype=torch.bool)
        carried_by = torch.tensor([self.carrier_of.get(label, -1) for label in labels])
        for carrier in carried_by.unique().tolist() if varies != "depends on the input" else []:
            mine = carried_by == carrier
            if carrier >= 0 and self._columns(reader, call, carrier, mine, labels, seen, index):
                left &= ~mine
                if bool((seen[:, mine] != 0).any()):
                    result.constant.add(carrier)
        if bool((seen[:, left] != 0).any()):
            reader.shift = shift(self.masked, call, positions[left], level[left])
            reader.note = f"{problem}: the interior value is folded"

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
            multiple = (
                fields @ shape / power if power else torch.zeros(len(members), dtype=torch.float64)
            )
            error = (fields - multiple.unsqueeze(1) * shape).abs()
            if bool((error > TOLERANCE * fields.abs().max()).any()):
                return False
            columns[int(positions[places[0]])] = (positions[members], multiple)
        reader.columns.update(columns)
        return True


def carriers(channels: Channels, alive: Tensor) -> dict[int, int]:
    """Removed class -> the removed class that can carry its constant: the first that the same
    layers write.

    Classes for which anything but their convolutions, their norms and their readers has parameters
    are left out: there a channel with β = 1 would be reshaped on its way.
    """
    graph = channels.graph
    writers: dict[int, tuple[str, ...]] = {}
    own: set[str | None] = set()
    for call in graph.projections:
        if not call.depthwise:
            own |= {call.weight, call.bias}
    for name, labels in channels.layers.items():
        norm = channels.calls[name]
        own |= {norm.weight, norm.bias, norm.mean, norm.var}
        if name not in channels.boundaries and norm.bias is not None:
            for label in labels[~alive[norm.inputs]].unique().tolist():
                writers[label] = (*writers.get(label, ()), name)
    reshaped = torch.zeros(graph.count, dtype=torch.bool)
    for (tensor, _), ids in graph.axes.items():
        if tensor not in own:
            reshaped[channels.label[ids]] = True
    first: dict[tuple[str, ...], int] = {}
    return {
        label: first.setdefault(names, label)
        for label, names in sorted(writers.items())
        if label != PIN and not bool(reshaped[label])
    }
