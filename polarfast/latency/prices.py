"""What a network takes when some channel classes go, from the times of its operators."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..errors import PlanError
from ..tracing.classes import Channels
from ..tracing.graph import Ragged
from ..tracing.operations import Operation
from .grid import across, along, at_edge, widths

#: (share of the channels, ms), ascending.
Line = list[tuple[float, float]]
Found = TypeVar("Found")


@dataclass
class Times:
    """How long operators take, in ms, by `Operation.key`.

    Attributes:
        step: widths within one step take the same time.
        projections: (inputs, outputs) -> ms of convolutions and linear layers, at the widths of
            `grid.widths`; depthwise ones at (channels, channels).
        others: of all other operators, by the share of their channels.
        put_backs: of normalizations that put channels back, by the share that they keep.
    """

    step: int
    projections: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)
    others: dict[str, Line] = field(default_factory=dict)
    put_backs: dict[str, Line] = field(default_factory=dict)


def ends(operation: Operation, step: int) -> tuple[list[int], list[int]]:
    """The numbers of input and output channels at which a projection is timed."""
    call = operation.projection
    assert call is not None
    n_in, n_out = call.inputs.numel(), call.outputs.numel()
    step = step * call.groups if not call.depthwise else step
    return widths(n_in, step), widths(n_out, step)


class Prices:
    """The time of one forward pass as a function of the classes that stay.

    Args:
        times: of its operators.
        channels: of the network, traced with its operations.
        scale: what the times of convolutions and linear layers, and of all others, are multiplied
            with.
        rest: ms that are there whatever stays.

    Raises:
        PlanError: an operator was not timed.
    """

    def __init__(
        self, times: Times, channels: Channels, scale: tuple[float, float], rest: float
    ) -> None:
        label = channels.label
        self._times, self._scale, self._rest = times, scale, rest
        self._projections: list[Operation] = []
        self._others: list[tuple[Line, Line | None, float]] = []
        inputs, outputs, others, weights = [], [], [], []
        for operation in channels.graph.operations:
            call, norm = operation.projection, operation.norm
            if call is not None:
                _timed(times.projections, operation)
                self._projections.append(operation)
                inputs.append(label[call.inputs])
                outputs.append(label[call.outputs])
                continue
            line, put_back = _timed(times.others, operation), None
            if norm is not None and norm.scale in channels.boundaries:
                put_back = _timed(times.put_backs, operation)
            full = 0
            for arg in operation.activations():
                assert arg.ids is not None
                others.append(label[arg.ids])
                weights.append((len(self._others), arg.elements // arg.ids.numel()))
                full += arg.elements
            self._others.append((line, put_back, full))
        self._inputs, self._outputs = Ragged(inputs), Ragged(outputs)
        self._read, self._weights = Ragged(others), weights

    def __call__(self, stays: Tensor) -> float:
        """In ms.

        Args:
            stays: bool [graph.count] by class label, constant channels among them.
        """
        projections, others = self.parts(stays)
        return self._scale[0] * projections + self._scale[1] * others + self._rest

    def parts(self, stays: Tensor) -> tuple[float, float]:
        """The times of convolutions and linear layers, and of all others, as they were measured."""
        step = self._times.step
        projections = 0.0
        n_in, n_out = self._inputs.counts(stays).tolist(), self._outputs.counts(stays).tolist()
        for operation, reads, writes in zip(self._projections, n_in, n_out, strict=True):
            known = self._times.projections[operation.key]
            projections += _at(known, operation, step, reads, writes)
        alive = [0] * len(self._others)
        for (row, elements), count in zip(
            self._weights, self._read.counts(stays).tolist(), strict=True
        ):
            alive[row] += elements * count
        others = 0.0
        for (line, put_back, full), now in zip(self._others, alive, strict=True):
            share = now / full if full else 1.0
            others += _on(put_back if put_back is not None and share < 1.0 else line, share)
        return projections, others


def _timed(times: Mapping[str, Found], operation: Operation) -> Found:
    if operation.key not in times:
        raise PlanError(
            "the latency table is of another network, or of another size of inputs: it has no time "
            f"for {json.loads(operation.key)[0]} as this network runs it. Measure this one with "
            "inputs of these sizes (pf.LatencyTable.measure)"
        )
    return times[operation.key]


def _at(
    times: Mapping[tuple[int, int], float], operation: Operation, step: int, n_in: int, n_out: int
) -> float:
    """Of a projection with so many channels. With none at all something small runs in its place,
    which is taken to be as fast as the narrowest that was timed.
    """
    rows, columns = ends(operation, step)
    if not n_in or not n_out:
        n_in, n_out = rows[0], columns[0]
    call = operation.projection
    assert call is not None
    step = step if call.depthwise else step * call.groups
    n_in, n_out = at_edge(n_in, rows[-1], step), at_edge(n_out, columns[-1], step)
    if call.depthwise:
        return along(rows, [times[row, row] for row in rows], n_in)
    return across(times, rows, columns, n_in, n_out)


def _on(line: Line, share: float) -> float:
    if len(line) == 1:  # not timed at other widths
        return line[0][1] * share
    if share == 0.0:  # as above
        return line[0][1]
    shares, times = zip(*line, strict=True)
    return along(shares, times, share)
