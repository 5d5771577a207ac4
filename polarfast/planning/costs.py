"""What a network costs when some channel classes go. `prediction.Widths` counts the same MACs by
layer, for `CutPredictor`.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers import gate_name, gated_modules
from ..tracing.classes import Channels
from ..tracing.graph import Macs, Ragged
from .limits import Counts

#: What a share may be a share of.
COSTS = ("macs", "params", "latency")
#: These in words.
NAMES = {"macs": "MACs", "params": "parameters", "latency": "time"}


def whole_steps(round_to: Counts, latency: "Latencies") -> Counts:
    """What widths are to be multiples of: of the table's step, where nothing else was asked for."""
    return latency.step if round_to == 1 else round_to


@dataclass(frozen=True)
class PlanLatency:
    """The time of one forward pass in eval mode.

    Attributes:
        before, after: in ms, as a `LatencyTable` predicts them.
        measured_before, measured: in ms, where the two networks were timed in turns.
        setting: what it holds for, in words.
    """

    before: float
    after: float
    measured_before: float | None = None
    measured: float | None = None
    setting: str = ""

    @property
    def cut(self) -> float:
        """The share of the time that is cut, as predicted."""
        return 1.0 - self.after / self.before

    @property
    def cut_measured(self) -> float | None:
        """The same as measured."""
        if self.measured is None or not self.measured_before:
            return None
        return 1.0 - self.measured / self.measured_before

    @property
    def error(self) -> float | None:
        """How far off the predicted share of the time that is left is, as a part of it."""
        cut = self.cut_measured
        return None if cut is None else (1.0 - self.cut) / (1.0 - cut) - 1.0

    def __str__(self) -> str:
        line = f"{self.before:.3g} → {self.after:.3g} ms  ({_change(self.cut)}) predicted"
        if self.cut_measured is not None:
            line += (
                f"; {self.measured_before:.3g} → {self.measured:.3g} ms "
                f"({_change(self.cut_measured)}) measured, prediction {self.error:+.1%} off"
            )
        return f"{line}; {self.setting}" if self.setting else line


def _change(cut: float) -> str:
    return f"−{cut:.1%}" if cut >= 0 else f"+{-cut:.1%}"


class Latencies(Protocol):
    """What a plan needs of a `LatencyTable`.

    Attributes:
        step: widths are planned in multiples of this.
    """

    @property
    def step(self) -> int: ...

    def check_inputs(self, example_inputs: Any) -> None:
        """Raise PlanError unless times hold for inputs of these sizes."""

    def check_network(self, channels: Channels) -> None:
        """Raise PlanError unless times hold for this network, traced with its operations."""

    def prices(self, channels: Channels) -> Callable[[Tensor], float]:
        """ms as a function of the classes that stay."""

    def measured(self, model: nn.Module, plan: Any) -> "PlanLatency":
        """The plan's latency, measured too if this is the machine that times hold for."""


def check_of(of: str, latency: Latencies | None) -> None:
    """Raise ArgumentError unless `of` is a cost, and a latency table is there iff it is needed."""
    if isinstance(latency, str | os.PathLike):
        raise ArgumentError(
            f"latency={os.fspath(latency)!r}: pass the table, pf.LatencyTable.load of that file"
        )
    if latency is not None and not hasattr(latency, "prices"):
        raise ArgumentError(
            f"latency is a {type(latency).__name__}: pass a pf.LatencyTable, of its measure or load"
        )
    if of not in COSTS:
        raise ArgumentError(f"of={of!r}: choose one of {', '.join(map(repr, COSTS))}")
    if of == "latency" and latency is None:
        raise ArgumentError(
            "of='latency' needs latency=, what pf.LatencyTable.measure(model, example_inputs) gives"
        )
    if of != "latency" and latency is not None:
        raise ArgumentError(f"latency= goes with of='latency', not with of={of!r}")


class Costs:
    """Multiply-accumulates and parameters as functions of the classes that stay, fast enough to be
    asked many times.

    Args:
        model, channels: the network and its channel classes.
        latency: its times, if they count; the network was traced with its operations then.
    """

    def __init__(
        self, model: nn.Module, channels: Channels, latency: Latencies | None = None
    ) -> None:
        graph, label = channels.graph, channels.label
        if latency is not None and not hasattr(model, "polarfast_info"):  # else it became another
            latency.check_network(channels)
        self.latency = None if latency is None else latency.prices(channels)
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

    def times(self, before: Tensor, stays: Tensor) -> "PlanLatency | None":
        """The predicted times, where that is possible."""
        if self.latency is None:
            return None
        return PlanLatency(self.latency(before), self.latency(stays))

    def one(self, of: str) -> Callable[[Tensor], float]:
        """One cost, by name, as a function of the classes that stay."""
        if of == "latency":
            assert self.latency is not None  # `check_of`
            return self.latency
        return self.macs if of == "macs" else self.params

    def all(self, stays: Tensor, new_biases: Iterable[Tensor] = ()) -> dict[str, float]:
        """Every cost, by name; latency in ms, where its times were given.

        Args:
            stays, new_biases: as for `params`.
        """
        found = {"macs": float(self.macs(stays)), "params": float(self.params(stays, new_biases))}
        return found if self.latency is None else {**found, "latency": self.latency(stays)}
