"""A fold written into the full-size tensors of a network, before anything is gathered."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .channels import Channels
from .fields import Fold, shift_of
from .gates import fold_gate, gate_name, gated_modules
from .layout import Layout
from .tracing import ProjectionCall

#: From a tensor's name, its full-size float64 copy to be edited in place.
Editor = Callable[[str], Tensor]


@dataclass
class Edits:
    """Tensors to gather instead of the model's own.

    Attributes:
        tensors: name -> full-size tensor (float64 where numbers changed).
        biases: name of a bias to create -> its values, float64 [C_out], and its channels' ids.
        blank: tensor name -> dimensions, and which positions along each (bool, [groups, n] where
            groups of rows differ) have their optimizer state start at 0 (constant channels).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    blank: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)


def new_biases(model: nn.Module, channels: Channels, fold: Fold, alive: Tensor) -> dict[str, int]:
    """Bias name -> length, of the biases that the fold creates."""
    existing = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {
        reader.sink: int(alive[channels.graph.projections[index].outputs].sum())
        for index, reader in fold.readers.items()
        if reader.adds and reader.sink is not None and reader.sink not in existing
    }


def write_edits(model: nn.Module, channels: Channels, fold: Fold) -> Edits:
    """The fold's numbers, in the model's own full-size tensors."""
    edits = Edits()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def edit(name: str) -> Tensor:
        if name not in edits.tensors:
            edits.tensors[name] = tensors[name].detach().double().clone()
        return edits.tensors[name]

    means = {norm.mean for norm in channels.graph.norms}
    done: set[str] = set()
    for index, reader in fold.readers.items():
        if not reader.adds or reader.sink is None or reader.sink in done:
            continue  # calls that share a sink agree on what it takes up
        done.add(reader.sink)
        shift = shift_of(channels.graph.projections[index], tensors[reader.weight], reader)
        if reader.sink not in tensors:
            outputs = channels.graph.projections[index].outputs
            edits.biases[reader.sink] = (shift.clone(), outputs)  # a gate may multiply it
            continue
        sign = -1.0 if reader.sink in means else 1.0
        edit(reader.sink).add_(shift.to(tensors[reader.sink].device), alpha=sign)
    if fold.constant:
        _silence(edits, channels, channels.in_classes(fold.constant), edit)
    for index, reader in fold.readers.items():
        for carrier, (positions, multiple) in reader.columns.items():
            call = channels.graph.projections[index]
            _carry(
                call,
                carrier,
                positions,
                multiple,
                edit(call.weight),
                tensors[call.weight].detach().double(),
            )
    _fold_gates(edits, model, edit)
    return edits


def _fold_gates(edits: Edits, model: nn.Module, edit: Editor) -> None:
    """Multiply every gate into its layer's weight and bias; the slim model has none."""
    for name, module in gated_modules(model):
        gate = edits.tensors.pop(gate_name(name), module.gate.detach().double())
        for own in ("weight", "bias"):
            full_name = gate_name(name).removesuffix("gate") + own
            if getattr(module, own) is not None:
                fold_gate(module, edit(full_name), gate)
            elif full_name in edits.biases:
                fold_gate(module, edits.biases[full_name][0], gate)


def _silence(edits: Edits, channels: Channels, wanted: Tensor, edit: Editor) -> None:
    """Make constant channels: nothing comes in, γ = 0, β = 1 at the first norm that writes them and
    0 at others; nobody reads them.

    The norm's output is then its β, and no gradient reaches γ or the producer's rows, so that they
    stay 0 in fine-tuning.

    Args:
        wanted: bool [graph.count], the ids of constant channels.
    """
    values: dict[str | None, float] = {}
    for call in channels.graph.projections:
        values |= {call.weight: 0.0, call.bias: 0.0}
    written = torch.zeros_like(wanted)
    ones: dict[str, Tensor] = {}
    for name in channels.layers:
        norm = channels.calls[name]
        values |= {norm.weight: 0.0, norm.bias: 0.0, norm.mean: 0.0, norm.var: 1.0, norm.gate: 1.0}
        mine = channels.label[norm.inputs]
        ones[str(norm.bias)] = wanted[norm.inputs] & ~written[mine]
        written[mine] = True
    for (tensor, dim), axis in channels.graph.axes.items():
        if tensor in values and bool(wanted[axis].any()):
            full = edit(tensor)
            _fill(full, dim, wanted[axis], values[tensor])
            if tensor in ones:
                full[ones[tensor].to(full.device)] = 1.0
            edits.blank.setdefault(tensor, []).append((dim, wanted[axis]))


def _fill(full: Tensor, dim: int, places: Tensor, value: float) -> None:
    """Set positions along a dimension, which may differ between groups of rows (`Edits.blank`)."""
    rows = places if places.dim() == 2 else places.unsqueeze(0)
    for block, row in zip(full.chunk(len(rows)), rows, strict=True):
        block.index_fill_(dim, row.nonzero().flatten().to(full.device), value)


def _carry(
    call: ProjectionCall,
    carrier: int,
    positions: Tensor,
    multiple: Tensor,
    full: Tensor,
    original: Tensor,
) -> None:
    """Outgoing weights of a constant channel: the sum of the removed channels' own, each times its
    multiple.
    """
    multiple, positions = multiple.to(full.device), positions.to(full.device)
    if call.transposed:
        full[carrier] = torch.tensordot(multiple, original[positions], 1)
        return
    per_group = call.inputs.numel() // call.groups
    rows = full.shape[0] // call.groups
    group = slice(carrier // per_group * rows, (carrier // per_group + 1) * rows)
    full[group, carrier % per_group] = torch.einsum(
        "c,oc...->o...", multiple, original[group][:, positions % per_group]
    )


def gather_state(layout: Layout, edits: Edits, name: str, tensor: Tensor) -> Tensor:
    """Optimizer state (of a parameter's shape) for the slim parameter."""
    if name in edits.blank:
        tensor = tensor.clone()
        for dim, places in edits.blank[name]:
            _fill(tensor, dim, places, 0.0)
    return layout.gather(name, tensor)
