"""A fold written into a network's tensors, cut to the channels that stay."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..copies import tensors_of_model
from ..folding.replay import Fold, shift_of
from ..kernels.gather import gather_channels
from ..layers import fold_gate, gate_name, gated_modules
from ..tracing.classes import Channels
from ..tracing.graph import ProjectionCall
from .structure import Layout

#: From a tensor's name, its cut copy to be edited in place.
Editor = Callable[[str], Tensor]


@dataclass
class Edits:
    """Tensors of the slim model that are more than the kept positions of the model's own.

    Attributes:
        tensors: name -> cut tensor (vectors in float64, so that they are rounded once).
        biases: name of a bias to create -> its values, float64.
        blank: tensor name -> dimensions, and which of the kept positions along each (bool,
            [groups, n] where groups of rows differ) have their optimizer state start at 0 (constant
            channels).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    blank: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)


def write_edits(model: nn.Module, channels: Channels, fold: Fold, layout: Layout) -> Edits:
    """The fold's numbers, in a model's own cut tensors."""
    edits = Edits()
    tensors = tensors_of_model(model)

    def edit(name: str) -> Tensor:
        if name not in edits.tensors:
            own = tensors[name].detach()
            cut = layout.gather(name, own) if layout.index(name) else own.clone()
            edits.tensors[name] = cut.double() if cut.dim() < 2 else cut
        return edits.tensors[name]

    means = {norm.mean for norm in channels.graph.norms}
    done: set[str] = set()
    for index, reader in fold.readers.items():
        if not reader.adds or reader.sink is None or reader.sink in done:
            continue  # calls that share a sink agree on what it takes up
        done.add(reader.sink)
        call = channels.graph.projections[index]
        rows = layout.alive[call.outputs].nonzero().flatten()
        shift = shift_of(call, tensors[reader.weight], reader, rows)
        if reader.sink not in tensors:
            edits.biases[reader.sink] = shift
            continue
        sign = -1.0 if reader.sink in means else 1.0
        edit(reader.sink).add_(shift.to(tensors[reader.sink].device), alpha=sign)
    if fold.constant:
        _silence(edits, layout, channels.in_classes(fold.constant), edit)
    for index, reader in fold.readers.items():
        call = channels.graph.projections[index]
        for carrier, (positions, multiple) in reader.columns.items():
            if not bool(layout.alive[call.inputs[carrier]]):
                continue  # no constant channel: all that it would carry is zero
            own = tensors[call.weight].detach()
            _carry(layout, call, carrier, positions, multiple, edit(call.weight), own)
    _fold_gates(edits, model, layout, edit)
    return edits


def _fold_gates(edits: Edits, model: nn.Module, layout: Layout, edit: Editor) -> None:
    """Multiply every gate into its layer's weight and bias; the slim model has none."""
    for name, module in gated_modules(model):
        full = gate_name(name)
        gate = edits.tensors.pop(full, module.gate.detach().double())
        ids = layout.graph.axes.get((full, 0))
        if ids is not None:
            gate = gate[layout.alive[ids].to(gate.device)]
        for own in ("weight", "bias"):
            beside = full.removesuffix("gate") + own
            if getattr(module, own) is not None:
                fold_gate(module, edit(beside), gate)
            elif beside in edits.biases:
                fold_gate(module, edits.biases[beside], gate)


def _silence(edits: Edits, layout: Layout, wanted: Tensor, edit: Editor) -> None:
    """Make constant channels: nothing comes in, γ = 0, β = 1 at the first norm that writes them and
    0 at others; nobody reads them.

    The norm's output is then its β, and no gradient reaches γ or the producer's rows, so that they
    stay 0 in fine-tuning.

    Args:
        wanted: bool [graph.count], the ids of constant channels.
    """
    channels = layout.channels
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
    found = channels.axes.counts(wanted).tolist()
    for ((tensor, dim), axis), count in zip(channels.graph.axes.items(), found, strict=True):
        if count and tensor in values:
            places = layout.places(tensor, dim, wanted[axis])
            cut = edit(tensor)
            _fill(cut, dim, places, values[tensor])
            if tensor in ones:
                cut[layout.places(tensor, dim, ones[tensor]).to(cut.device)] = 1.0
            edits.blank.setdefault(tensor, []).append((dim, places))


def _fill(tensor: Tensor, dim: int, places: Tensor, value: float) -> None:
    """Set positions along a dimension, which may differ between groups of rows (`Edits.blank`)."""
    rows = places if places.dim() == 2 else places.unsqueeze(0)
    for block, row in zip(tensor.chunk(len(rows)), rows, strict=True):
        block.index_fill_(dim, row.nonzero().flatten().to(tensor.device), value)


def _carry(
    layout: Layout,
    call: ProjectionCall,
    carrier: int,
    positions: Tensor,
    multiple: Tensor,
    cut: Tensor,
    own: Tensor,
) -> None:
    """Outgoing weights of a constant channel: the sum of the removed channels' own, each times its
    multiple.

    Args:
        cut: the reader's weight in the slim model, changed in place.
        own: its full-size weight.
    """
    per_group = call.inputs.numel() // call.groups
    group, within = divmod(carrier, per_group)
    wanted = torch.zeros(call.inputs.numel(), dtype=torch.bool, device="cpu")
    wanted[carrier] = True
    weigh = multiple.to(own.device)
    if call.transposed:
        row = int(layout.places(call.weight, 0, wanted).nonzero())
        columns = layout.index(call.weight).get(1)
        if columns is not None and columns.dim() == 2:
            columns = columns[group]
        used = gather_channels(own, positions, columns).double()
        cut[row] = torch.tensordot(weigh, used, 1)
        return
    column = layout.places(
        call.weight, 1, wanted.view(call.groups, -1) if call.groups > 1 else wanted
    )
    rows = layout.alive[call.outputs].view(call.groups, -1)[group].nonzero().flatten()
    used = gather_channels(
        own, rows + group * (own.shape[0] // call.groups), positions % per_group
    ).double()
    block = cut.chunk(call.groups)[group]
    place = int((column[group] if call.groups > 1 else column).nonzero())
    block[:, place] = torch.einsum("c,oc...->o...", weigh, used).to(cut.dtype)


def gather_state(layout: Layout, edits: Edits, name: str, tensor: Tensor) -> Tensor:
    """Optimizer state (of a parameter's shape) for the slim parameter."""
    cut = layout.gather(name, tensor) if layout.index(name) else tensor.clone()
    if name in edits.blank:
        for dim, places in edits.blank[name]:
            _fill(cut, dim, places, 0.0)
    return cut
