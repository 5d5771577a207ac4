"""Which positions of every tensor stay when some channels go, and what the slim model costs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kernels.gather import gather_channels
from ..layers import gate_name, gated_modules
from ..tracing.classes import Channels
from ..tracing.graph import ProjectionCall, Ragged


class Layout:
    """The slim model's sizes, given the channels that stay.

    Attributes:
        alive: bool [graph.count], the ids that stay (a constant channel stays).
    """

    def __init__(self, channels: Channels, alive: Tensor) -> None:
        self.channels, self.graph, self.alive = channels, channels.graph, alive
        self._index: dict[str, dict[int, Tensor]] = {}
        gates = self.graph.gate_names()  # no slim model has any
        lost = channels.axes.counts(~alive).tolist()
        for ((name, dim), ids), gone in zip(self.graph.axes.items(), lost, strict=True):
            if gone and name not in gates:
                kept = alive[ids].nonzero()[:, -1]
                # Groups keep as many positions each, but not the same ones.
                index = kept.view(len(ids), -1) if ids.dim() == 2 else kept
                self._index.setdefault(name, {})[dim] = index

    def index(self, name: str) -> dict[int, Tensor]:
        """Dimension -> positions kept, for the dimensions of a tensor that lose any; [groups, n]
        where each group of rows keeps others.
        """
        return self._index.get(name, {})

    def places(self, name: str, dim: int, mask: Tensor) -> Tensor:
        """A mask over a tensor's positions along a dimension ([groups, n] where each group of rows
        has its own), cut to those that stay.
        """
        index = self.index(name).get(dim)
        if index is None:
            return mask
        return mask.gather(1, index) if index.dim() == 2 else mask[index]

    def changed(self) -> list[str]:
        """Names of all tensors that lose positions."""
        return list(self._index)

    def shape(self, name: str, tensor: Tensor) -> list[int]:
        """The shape in the slim model of the tensor of that name."""
        shape = list(tensor.shape)
        for dim, kept in self.index(name).items():
            shape[dim] = kept.shape[-1]
        return shape

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """The kept positions of a tensor shaped like the one of that name."""
        index = self.index(name)
        if 1 in index and index[1].dim() == 2:
            blocks = tensor.chunk(len(index[1]))
            pairs = zip(blocks, index[1], strict=True)
            tensor = torch.cat([gather_channels(block, None, kept) for block, kept in pairs])
            index = {dim: kept for dim, kept in index.items() if dim != 1}
        if index.keys() & {0, 1}:
            tensor = gather_channels(tensor, index.get(0), index.get(1))
        for dim in index.keys() - {0, 1}:
            tensor = tensor.index_select(dim, index[dim].to(tensor.device))
        return tensor

    def sizes(self, call: ProjectionCall) -> tuple[int, int]:
        """Input and output channels of a call that stay."""
        return int(self.alive[call.inputs].sum()), int(self.alive[call.outputs].sum())


#: What a share may be a share of.
COSTS = ("macs", "params")


class Costs:
    """Multiply-accumulates and parameters as functions of the classes that stay, fast enough to be
    asked many times.

    Args:
        model, channels: the network and its channel classes.
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        graph, label = channels.graph, channels.label
        self._calls = [call for call in graph.projections if call.counted]
        self._inputs = Ragged([label[call.inputs] for call in self._calls])
        self._outputs = Ragged([label[call.outputs] for call in self._calls])
        self._fixed_macs = graph.fixed_macs
        gates = {gate_name(name) for name, _ in gated_modules(model)}
        params = {n: p.shape for n, p in model.named_parameters() if n not in gates}
        axes = {
            key: ids
            for key, ids in graph.axes.items()
            if key[0] in params and key[0] not in graph.gate_names()
        }
        # [groups, n] where groups keep other channels, but as many: one of them tells.
        self._axes = Ragged([label[ids if ids.dim() == 1 else ids[0]] for ids in axes.values()])
        rows: dict[str, dict[int, int]] = {}
        for row, (name, dim) in enumerate(axes):
            rows.setdefault(name, {})[dim] = row
        self._params: list[tuple[int, tuple[int, ...]]] = []  # fixed part, rows of `_axes`
        for name, shape in params.items():
            mine = rows.get(name, {})
            fixed = torch.Size(n for dim, n in enumerate(shape) if dim not in mine).numel()
            self._params.append((fixed, tuple(mine.values())))

    def macs(self, stays: Tensor) -> int:
        """Multiply-accumulates on the example inputs.

        Args:
            stays: bool [graph.count] by class label, constant channels among them.
        """
        n_in, n_out = self._inputs.counts(stays).tolist(), self._outputs.counts(stays).tolist()
        macs = (call.macs(*sizes) for call, *sizes in zip(self._calls, n_in, n_out, strict=True))
        return sum(macs) + self._fixed_macs

    def params(self, stays: Tensor, new_biases: Iterable[Tensor] = ()) -> int:
        """Number of parameters, gates left out.

        Args:
            stays: as for `macs`.
            new_biases: for each bias that is created, the classes of its channels.
        """
        sizes = self._axes.counts(stays).tolist()
        total = sum(int(stays[labels].sum()) for labels in new_biases)
        for number, rows in self._params:
            for row in rows:
                number *= sizes[row]
            total += number
        return total
