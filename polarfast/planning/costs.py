"""What a network costs when some channel classes go. `prediction.Widths` counts the same MACs by
layer, for `CutPredictor`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..layers import gate_name, gated_modules
from ..tracing.classes import Channels
from ..tracing.graph import Macs, Ragged

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
        self._macs = Macs(graph, label)
        gates = {gate_name(name) for name, _ in gated_modules(model)}
        params = {n: p.shape for n, p in model.named_parameters() if n not in gates}
        axes = {key: ids for key, ids in graph.axes.items() if key[0] in params}
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
        return self._macs(stays)

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
