"""What a dry run finds out about a model: channel ids, and the `Graph` of the calls that read and
write them. Names and ids only: it holds none of the model's tensors.

An activation's ids are an int64 CPU tensor of the activation's shape: which channel each element
belongs to. They almost always vary along one dimension only, so they are kept as expanded
(stride 0) views and cost a few hundred bytes; `compact` drops the repeated dimensions again.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

#: The id of an element whose position cannot be removed: network inputs, padding, results of
#: unknown operators.
PIN = 0


def compact(ids: Tensor) -> Tensor:
    """`ids` with every repeated (stride 0) dimension narrowed to length 1."""
    for dim, stride in enumerate(ids.stride()):
        if stride == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def varying_dims(ids: Tensor) -> set[int]:
    """The dimensions along which `ids` really differ."""
    small = compact(ids)
    return {
        dim
        for dim, size in enumerate(small.shape)
        if size > 1 and bool((small != small.narrow(dim, 0, 1)).any())
    }


def along(ids: Tensor, dim: int) -> Tensor | None:
    """Ids per index of `dim`, shape [ids.shape[dim]]; None where they also vary along another
    dimension.
    """
    size = ids.shape[dim]
    if varying_dims(ids) - {dim}:
        return None
    line = compact(ids)
    for other in range(line.dim()):
        if other != dim:
            line = line.narrow(other, 0, 1)
    return line.reshape(-1).expand(size) if line.numel() == 1 else line.reshape(size)


def components(count: int, edges: Tensor) -> Tensor:
    """Labels of the connected components of a graph on `count` ids.

    Args:
        count: number of ids.
        edges: int64 [2, E].

    Returns:
        int64 [count]: the smallest id of each id's component (so everything joined to PIN gets
        label PIN).
    """
    label = torch.arange(count, device="cpu")
    while True:
        left, right = label[edges[0]], label[edges[1]]
        if torch.equal(left, right):
            return label
        # Hang the larger root under the smaller one, then point every id straight at its root.
        label = label.scatter_reduce(
            0, torch.maximum(left, right), torch.minimum(left, right), "amin"
        )
        while not torch.equal(shorter := label[label], label):
            label = shorter


class Ragged:
    """Index lists into a table of classes, kept end to end.

    Attributes:
        flat: int64, all lists one after the other.
        sizes: length of each.
    """

    def __init__(self, lists: Sequence[Tensor]) -> None:
        self.sizes = [part.numel() for part in lists]
        none = torch.zeros(0, dtype=torch.long, device="cpu")
        self.flat = torch.cat([none, *(part.flatten() for part in lists)])

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor([0, *self.sizes], device="cpu").cumsum(0)

    @cached_property
    def rows(self) -> Tensor:
        """int64, the list that each entry of `flat` belongs to."""
        rows = torch.arange(len(self.sizes), device="cpu")
        return rows.repeat_interleave(torch.tensor(self.sizes, dtype=torch.long, device="cpu"))

    def counts(self, mask: Tensor) -> Tensor:
        """int64 [number of lists]: entries of each whose class is in `mask` (bool by class)."""
        sums = torch.zeros(self.flat.numel() + 1, dtype=torch.long, device="cpu")
        torch.cumsum(mask.index_select(0, self.flat), 0, out=sums[1:])
        return sums[self._ends].diff()

    def of(self, lists: Tensor) -> Tensor:
        """All entries of the lists chosen (bool [number of lists])."""
        return self.flat[lists[self.rows]]


@dataclass(frozen=True, eq=False)
class ProjectionCall:
    """One execution of a convolution or linear layer, which reads channels and writes new ones.

    Attributes:
        weight, bias: parameter names.
        inputs, outputs: channel ids, int64 [C_in], [C_out]. A depthwise convolution's outputs are
            its inputs' ids.
        groups: number of groups (of equal size, and kept so).
        depthwise: one input channel per group.
        transposed: transposed convolution (weight is [C_in, C_out / groups, ...]).
        padded: whether the convolution pads its input with zeros.
        counted: whether it ran in eval mode: MACs are counted there.
        positions: output positions, the batch included.
        taps: kernel positions per channel pair.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: Tensor
    groups: int
    depthwise: bool
    transposed: bool
    padded: bool
    counted: bool
    positions: int
    taps: int

    def macs(self, n_in: int, n_out: int) -> int:
        """Multiply-accumulates with `n_in` input and `n_out` output channels."""
        return self.positions * self.taps * n_out * (1 if self.depthwise else n_in // self.groups)


@dataclass(frozen=True, eq=False)
class NormCall:
    """One execution of a batch normalization, or of a gate behind a convolution or linear layer.
    `outputs` are new ids, linked to `inputs` unless the norm is a boundary.

    Attributes:
        weight, bias, mean, var: names of parameters and buffers, None where there is none (all four
            where a gate stands alone).
        inputs, outputs: channel ids, int64 [C].
        source: index in `Graph.projections` of the call whose output, untouched, it normalizes.
        depth: convolutions and linear layers on the longest path from the network's input.
        node: this call's node in `Graph.parents`.
        gate: name of the gate that multiplies the output.
    """

    weight: str | None
    bias: str | None
    mean: str | None
    var: str | None
    inputs: Tensor
    outputs: Tensor
    source: int | None
    depth: int
    node: int
    gate: str | None = None

    @property
    def scale(self) -> str | None:
        """The scaling factor: the gate, where there is one, else γ."""
        return self.gate or self.weight

    @property
    def normalizes(self) -> bool:
        """Whether this is a normalization, not a gate alone."""
        return self.gate is None or self.weight is not None


@dataclass(frozen=True, eq=False)
class Addition:
    """Two activations added element by element: ids (flat, paired) and the depth of either."""

    left: Tensor
    right: Tensor
    left_depth: int
    right_depth: int


@dataclass(frozen=True, eq=False)
class Product:
    """Two activations multiplied element by element (or divided): ids (flat, paired), and those of
    the result, which are its own: what is added to a product is added to neither factor.

    Attributes:
        left_zero, right_zero: whether a channel of which the factor's norm makes 0 is still 0 where
            it is multiplied (behind a sigmoid it is not), and the result then is.
    """

    left: Tensor
    right: Tensor
    out: Tensor
    left_zero: bool
    right_zero: bool


@dataclass(frozen=True, eq=False)
class Pin:
    """Ids whose channels must stay, and why."""

    ids: Tensor
    reason: str


@dataclass(frozen=True, eq=False)
class Match:
    """Rows of ids, in any order, that the network's code takes to be equal in number: their
    channels must stay unless they go together. And where.
    """

    left: Tensor
    right: Tensor
    reason: str


@dataclass(eq=False)
class Graph:
    """The channels of a model.

    Attributes:
        count: number of ids.
        projections, norms: calls in the order of execution.
        axes: (tensor name, dimension) -> id of each index: how every parameter and buffer follows
            the channels. For dimension 1 of a grouped convolution's weight, [groups, n]: each group
            of rows follows its own.
        ties: pairs of ids [2, E] that stand for the same channel (or must be kept or removed
            together).
        products: activations that meet in a multiplication.
        balanced: ids [P, m]: as many must stay in each row (groups of a convolution, chunks).
        matched: rows of ids that the network's code takes to be equal in number.
        additions: activations that meet in an addition.
        pins: channels that must stay.
        pooled: ids that pass through an operator that refuses an activation with no channel at all.
        parents: for each node, the nodes it is computed from.
        inputs, outputs: nodes of the network's inputs and outputs.
        fixed_macs: multiply-accumulates of matrix products whose channels are not followed.
        unrun: modules that did not run -> the name of a parameter of their own.
        tied: weights that several modules hold.
        numbers: rows of ids whose number the network's code was seen to compute with (x /
            x.shape[1]).
        operations: what the network ran (`Operation`s), if that was asked for.
    """

    count: int = 1
    projections: list[ProjectionCall] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    axes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    ties: list[Tensor] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    balanced: list[Tensor] = field(default_factory=list)
    matched: list[Match] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)
    parents: list[tuple[int, ...]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    fixed_macs: int = 0
    unrun: dict[str, str] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    numbers: list[Tensor] = field(default_factory=list)
    operations: tuple[Any, ...] = ()

    def copy(self) -> "Graph":
        """A graph that can be written on while this one stays as it is."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Graph(**{name: copy(part) for name, part in parts.items()})

    def labels(self, *edge_sets: list[Tensor]) -> Tensor:
        """Component label of every id under the ties and the given further edges, int64 [count]."""
        edges = [*self.ties, *(edge for edges in edge_sets for edge in edges)]
        return components(
            self.count,
            torch.cat(edges, 1) if edges else torch.zeros(2, 0, dtype=torch.long, device="cpu"),
        )

    def mask(self, at: Iterable[int] = ()) -> Tensor:
        """bool [count]: True at these ids or labels."""
        found = torch.zeros(self.count, dtype=torch.bool, device="cpu")
        found[list(at)] = True
        return found

    def links(self, boundaries: frozenset[str] = frozenset()) -> list[Tensor]:
        """Edges from each norm's inputs to its outputs, but for norms whose scaling factor is in
        `boundaries`.
        """
        return [torch.stack((c.inputs, c.outputs)) for c in self.norms if c.scale not in boundaries]

    def projection_weights(self) -> set[str]:
        """Names of the weights of convolutions and linear layers, apart from depthwise ones."""
        depthwise = {call.weight for call in self.projections if call.depthwise}
        return {call.weight for call in self.projections} - depthwise

    def gate_names(self) -> set[str]:
        """Names of all gates."""
        return {call.gate for call in self.norms if call.gate is not None}

    def pin_edges(self) -> list[Tensor]:
        """Edges from PIN to every pinned id."""
        return [torch.stack((torch.full_like(pin.ids, PIN), pin.ids)) for pin in self.pins]

    def addition_edges(self) -> list[Tensor]:
        """Edges between the channels that meet in additions."""
        return [torch.stack((add.left, add.right)) for add in self.additions]

    def product_edges(self) -> list[Tensor]:
        """Edges from the factors of each product to its result."""
        return [
            torch.stack((side, product.out))
            for product in self.products
            for side in (product.left, product.right)
        ]

    def reachable(self, cut: set[int]) -> bool:
        """Whether every output still depends on an input when nodes in `cut` pass nothing on."""
        alive = [False] * len(self.parents)
        for node in self.inputs:
            alive[node] = True
        for node, parents in enumerate(self.parents):  # parents come before their children
            if parents and node not in cut:
                alive[node] = any(alive[parent] for parent in parents)
        return all(alive[node] for node in self.outputs)


class Macs:
    """Multiply-accumulates on the example inputs, as a function of what stays; fast enough to be
    asked many times.

    Args:
        graph: the calls.
        label: int64 [graph.count], the class of each id.
    """

    def __init__(self, graph: Graph, label: Tensor) -> None:
        self._calls = [call for call in graph.projections if call.counted]
        self._inputs = Ragged([label[call.inputs] for call in self._calls])
        self._outputs = Ragged([label[call.outputs] for call in self._calls])
        self._fixed = graph.fixed_macs

    def __call__(self, stays: Tensor) -> int:
        """Their number when these classes stay (bool [graph.count] by label)."""
        n_in, n_out = self._inputs.counts(stays).tolist(), self._outputs.counts(stays).tolist()
        macs = (call.macs(*sizes) for call, *sizes in zip(self._calls, n_in, n_out, strict=True))
        return sum(macs) + self._fixed
