"""What removed channels leave behind: constants, handed on to whatever reads them.

A channel with γ = 0 is not nothing. It is the constant act(β), input-independent, and its readers see it. The constants are read
off the real network: a float64 copy with γ = 0 on the removed channels runs in eval mode, and what a reader sees in a removed
channel *is* the constant. Where it is the same everywhere, it becomes a bias; where zero padding (or another linear map that all
removed channels share) shapes it, one constant channel with γ = 0, β = 1 carries that shape for all of them.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .channels import Channels
from .inputs import Spec, device_of, generate
from .tracing import PIN, ProjectionCall, call_model

#: A field counts as one constant (or as proportional to another field) up to this share of its largest value: float64 rounding.
TOLERANCE = 1e-11
Fields = dict[int, Tensor]


@dataclass
class ReaderFold:
    """How one reader takes over the constants of the removed channels that it read.

    Attributes:
        weight: the reader's parameter name.
        shift: float64 [C_out], what the constants add to the reader's output.
        columns: constant channel's id -> removed channels' ids it stands for, and each one's multiple of the constant channel.
        note: why the fold is not exact; None if it is.
    """

    weight: str
    shift: Tensor | None = None
    columns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    note: str | None = None


@dataclass
class Fold:
    """All constants of a network.

    Attributes:
        readers: by index into `graph.projections`.
        constant: classes that stay as constant channels (in a grouped convolution, one channel per group).
    """

    readers: dict[int, ReaderFold] = field(default_factory=dict)
    constant: set[int] = field(default_factory=set)

    def notes(self) -> dict[str, str]:
        """Reader's weight name -> why its fold is not exact."""
        return {reader.weight: reader.note for reader in self.readers.values() if reader.note}


def masked_copy(model: nn.Module, kept: dict[str, Tensor], zero_beta: bool) -> nn.Module:
    """A float64 copy of `model` in eval mode with γ (and β if `zero_beta`) zero on the removed channels: the reference."""
    masked = copy.deepcopy(model).double().eval()
    params = dict(masked.named_parameters())
    with torch.no_grad():
        for name, keep in kept.items():
            gone = torch.ones(params[name].numel(), dtype=torch.bool)
            gone[keep] = False
            gone = gone.to(params[name].device)
            params[name][gone] = 0
            beta = params.get(name.removesuffix("weight") + "bias")
            if zero_beta and beta is not None:
                beta[gone] = 0
    return masked


class _Reads(TorchDispatchMode):
    """Notes what each convolution and linear layer reads in the channels asked for."""

    def __init__(self, model: nn.Module, wanted: dict[int, Tensor], calls: list[ProjectionCall]) -> None:
        super().__init__()
        names = {param.data_ptr(): name for name, param in model.named_parameters()}
        self.names, self.wanted, self.fields = names, wanted, Fields()
        self.waiting: dict[str, Iterator[int]] = {}
        order: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            order.setdefault(call.weight, []).append(i)
        self.waiting = {name: iter(indices) for name, indices in order.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        place = {"convolution": (0, 1), "addmm": (1, 2), "mm": (0, 1)}.get(name)
        if place is not None:
            x, weight = args[place[0]], args[place[1]]
            index = next(self.waiting.get(self.names.get(weight.data_ptr(), ""), iter(())), None)
            if index in self.wanted:
                self.fields[index] = x[:, self.wanted[index].to(x.device)].cpu()
        return func(*args, **(kwargs or {}))


def read_fields(model: nn.Module, inputs: Any, wanted: dict[int, Tensor], calls: list[ProjectionCall]) -> Fields:
    """Run `model`; for each call index in `wanted`, what it reads in those input channels: float64 [N, R, ...]."""
    reads = _Reads(model, wanted, calls)
    with torch.no_grad(), reads:
        call_model(model, inputs)
    return reads.fields


def fold_constants(
    model: nn.Module,
    channels: Channels,
    kept: dict[str, Tensor],
    alive: Tensor,
    spec: Spec,
    mode: str,
    forced: Iterable[int] = (),
) -> Fold:
    """Work out what the readers of removed channels must take over.

    Args:
        model: the original network.
        channels: its channel classes.
        kept: γ name -> kept channels.
        alive: bool [graph.count], without constant channels.
        spec: description of the inputs.
        mode: "none" (β is dropped first), "bias" or "exact".
        forced: classes that stay as constant channels whether or not they are needed, as a plan says.
    """
    graph = channels.graph
    gone = {i: (~alive[call.inputs]).nonzero().flatten() for i, call in enumerate(graph.projections)}
    wanted = {
        i: idx
        for i, idx in gone.items()
        if idx.numel() and not graph.projections[i].depthwise and bool(alive[graph.projections[i].outputs].any())
    }
    result = Fold(constant=set(forced))
    if not wanted:
        return result
    masked = masked_copy(model, kept, mode == "none")
    device = device_of(model)
    first, second = (
        read_fields(masked, generate(spec, device=device, dtype=torch.float64, seed=seed), wanted, graph.projections)
        for seed in (1, 2)
    )
    pending: dict[int, str] = {}
    for i, seen in first.items():
        call = graph.projections[i]
        if not bool(seen.any()) and not bool(second[i].any()):
            continue
        reader = result.readers[i] = ReaderFold(call.weight)
        level, problem = _level(seen, second[i])
        edge = call.padded or call.transposed
        if problem is None and not edge or mode == "bias":
            reader.note = problem or ("zero padding: not exact at the border" if edge else None)
            reader.shift = shift(masked, call, wanted[i], level)
        else:
            pending[i] = problem or "zero padding"
    if pending:
        carry = _Carriers(masked, channels, alive, wanted, spec).carry
        for i, problem in pending.items():
            carry(result, i, first[i], second[i], problem)
    return result


def _level(seen: Tensor, again: Tensor) -> tuple[Tensor, str | None]:
    """Each removed channel's value where it is read, [R], taken in the interior; and why it is not one value, if so."""
    flat = seen.transpose(0, 1).flatten(1)
    scale = flat.abs().max() * TOLERANCE
    middle = tuple(size // 2 for size in seen.shape[2:])
    level = seen[(slice(None), slice(None), *middle)].mean(0)
    if seen.shape != again.shape or bool(((seen - again).abs() > scale).any()):
        return level, "depends on the input"
    if bool(((flat - level.unsqueeze(1)).abs() > scale).any()):
        return level, "differs from place to place"
    return level, None


def shift(masked: nn.Module, call: ProjectionCall, positions: Tensor, level: Tensor) -> Tensor:
    """What constant inputs add to each output channel in the interior, float64 [C_out]."""
    weight = masked.get_parameter(call.weight).detach().cpu()
    value = torch.zeros(call.inputs.numel(), dtype=torch.float64)
    value[positions] = level
    if call.transposed:
        weight = weight.flatten(2).mean(2) if weight.dim() > 2 else weight
        per_group = weight.view(call.groups, -1, weight.shape[1]) * value.view(call.groups, -1, 1)
        return per_group.sum(1).flatten()
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    per_group = weight.view(call.groups, -1, weight.shape[1]) * value.view(call.groups, 1, -1)
    return per_group.sum(2).flatten()


class _Carriers:
    """Constant channels: for each set of layers that write the same channels, one removed channel that may stand for all.

    The masked network runs once more with β = 1 on these channels (on the first norm that writes it; the others' β is 0), which
    shows the shape in which each reader sees such a channel.
    """

    def __init__(
        self, masked: nn.Module, channels: Channels, alive: Tensor, wanted: dict[int, Tensor], spec: Spec
    ) -> None:
        self.masked, self.channels, self.wanted = masked, channels, wanted
        self.carrier_of = carriers(channels, alive)
        with self._ones():
            inputs = generate(spec, device=device_of(masked), dtype=torch.float64, seed=1)
            self.unit = read_fields(masked, inputs, wanted, channels.graph.projections)

    @contextmanager
    def _ones(self) -> Iterator[None]:
        params = dict(self.masked.named_parameters())
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
        """Let constant channels carry what one reader sees; where they cannot, fold the interior value and say so."""
        call = self.channels.graph.projections[index]
        reader, positions = result.readers[index], self.wanted[index]
        labels = self.channels.label[call.inputs[positions]].tolist()
        level, varies = _level(seen, again)
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
        """Express the fields of the channels that share a carrier as multiples of its field; False if they are not."""
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
            multiple = fields @ shape / power if power else torch.zeros(len(members), dtype=torch.float64)
            error = (fields - multiple.unsqueeze(1) * shape).abs()
            if bool((error > TOLERANCE * fields.abs().max()).any()):
                return False
            columns[int(positions[places[0]])] = (positions[members], multiple)
        reader.columns.update(columns)
        return True


def carriers(channels: Channels, alive: Tensor) -> dict[int, int]:
    """Removed class -> the removed class that can carry its constant: the first that the same layers write.

    Classes for which anything but their convolutions, their norms and their readers has parameters are left out: there a channel
    with β = 1 would be reshaped on its way.
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
