"""The state of a dry run: ids of live activations, names of parameters, and the graph being
written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..copies import tensors_of_model
from ..layers import gate_name, gated_modules
from .graph import PIN, Addition, Graph, Match, Pin, Product, along, compact, varying_dims


@dataclass(eq=False)
class Value:
    """An activation: its ids (of its own shape), its node, and the projections on the longest path
    to it. `repeated`: dimensions along which it is repeated as often as there are channels of
    another activation -> the ids of these.
    """

    ids: Tensor
    node: int
    depth: int
    repeated: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterView:
    """A parameter or buffer, perhaps transposed or with dimensions of size 1 put in: `dims[i]` is
    its dimension at i. `gate`: name of the gate that it is multiplied by. `others`: names of
    further parameters that lie as it does, of what is computed of several.
    """

    name: str
    dims: tuple[int | None, ...]
    gate: str | None = None
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.others)


class Recorder:
    """Collects a `Graph` while operators run."""

    def __init__(self, model: nn.Module) -> None:
        self.graph = Graph()
        self.values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        #: parts of parameters, and what is computed of some element by element: followed as these
        #: are where it meets activations, and by no layer
        self.functions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.written: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.normed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        #: activations that are another number where their channels are 0
        self.nonzero: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.gates = {gate_name(name) for name, _ in gated_modules(model)}
        #: made of zeros, and not written since
        self.zeros: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.finished = False
        self.counting = True  # whether this pass's MACs count
        self.again = False  # whether it is of a further example: calls as before are left out
        self.asked: list[Any] | None = None  # sizes in the network's own call, while it runs
        self.groups: Any = 1  # of a convolution that it calls, while that runs
        self.operations: list[Any] | None = None  # `Operation`s, where they are asked for
        #: weights of modules whose number of groups a slim model can change
        self.convolutions = {
            f"{name}.weight" if name else "weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.conv._ConvNd)
        }
        #: weight -> module, of attention whose query is as wide as what it computes with
        self.queries = {
            f"{name}.{weight}".lstrip("."): name or "the model"
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for weight in ("in_proj_weight", "q_proj_weight")
        }
        self.used: set[str] = set()
        self.seen: set[str] = set()  # parameters and buffers that some operator was given
        self.whole: set[str] = set()
        for name, tensor in tensors_of_model(model).items():
            self.views[tensor] = ParameterView(name, tuple(range(tensor.dim())))
        held: set[int] = set()
        for module in model.modules():
            for param in module._parameters.values():
                if param is not None and id(param) in held:
                    self.graph.tied.add(self.views[param].name)
                held.add(id(param))

    # --- values

    def value(self, tensor: object) -> Value | None:
        return self.values.get(tensor) if isinstance(tensor, Tensor) else None

    def view(self, tensor: object) -> ParameterView | None:
        return self.views.get(tensor) if isinstance(tensor, Tensor) else None

    def view_or_function(self, tensor: object) -> ParameterView | None:
        return self.view(tensor) or (
            self.functions.get(tensor) if isinstance(tensor, Tensor) else None
        )

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Note which parameters and buffers an operator is given."""
        for tensor in tensors:
            view = self.views.get(tensor)
            if view is not None:
                self.seen.add(view.name)

    def start(self, ids: Tensor, node: int) -> Value:
        """A network input."""
        return Value(ids, node, 0)

    def touched(self, tensor: Tensor) -> None:
        """Say that a tensor was changed in place, and with it what it is a view of: they are no
        longer what a call wrote, or made.
        """
        for changed in (tensor, tensor._base):
            for known in (self.written, self.normed, self.zeros):
                if changed is not None and changed in known:
                    del known[changed]

    def put(self, tensor: Tensor, ids: Tensor, sources: Iterable[Value]) -> None:
        """Track `tensor`. A node of its own only where several values meet."""
        sources = list(sources)
        nodes = sorted({source.node for source in sources})
        node = nodes[0] if len(nodes) == 1 else self.node(nodes)
        self.values[tensor] = Value(ids, node, max(source.depth for source in sources))

    def put_pinned(self, tensor: Tensor, sources: Iterable[Value]) -> None:
        """Track a result none of whose positions can be removed."""
        self.put(tensor, pinned_ids(tensor), sources)

    # --- graph

    def node(self, parents: Iterable[int]) -> int:
        self.graph.parents.append(tuple(parents))
        return len(self.graph.parents) - 1

    def fresh(self, count: int) -> Tensor:
        """`count` new channel ids."""
        first = self.graph.count
        self.graph.count += count
        return torch.arange(first, first + count, device="cpu")

    def tie(self, left: Tensor, right: Tensor) -> None:
        """Say that two rows of ids are, pair by pair, the same channels."""
        if left is not right and not torch.equal(left, right):
            self.graph.ties.append(torch.stack((left.reshape(-1), right.reshape(-1))))

    def multiply(self, left: Tensor, right: Tensor, left_zero: bool, right_zero: bool) -> Tensor:
        """The ids of the product of two activations with ids of one shape (see `Product`)."""
        pairs = torch.stack((left.reshape(-1), right.reshape(-1)))
        pairs, places = pairs.unique(dim=1, return_inverse=True)
        out = self.fresh(pairs.shape[1])
        self.graph.products.append(Product(pairs[0], pairs[1], out, left_zero, right_zero))
        return out[places].view(left.shape)

    def add(self, left: Tensor, right: Tensor, left_depth: int, right_depth: int) -> None:
        """Say that channels meet in an addition. Products that share a factor go together already:
        they are the same channels, as in x + x * gate.
        """
        left, right = left.reshape(-1), right.reshape(-1)
        others = self._factors(right)
        if any(torch.equal(one, other) for one in self._factors(left) for other in others):
            self.tie(left, right)
        else:
            self.graph.additions.append(Addition(left, right, left_depth, right_depth))

    def _factors(self, ids: Tensor) -> list[Tensor]:
        """These ids and, if they are of a product, those of all its factors."""
        found, left = list[Tensor](), [ids]
        while left:
            ids = left.pop()
            if any(torch.equal(ids, each) for each in found):
                continue
            found.append(ids)
            for product in self.graph.products:
                place = ids - product.out[0]  # new ids are a run of numbers
                if bool(((place >= 0) & (place < product.out.numel())).all()):
                    left += [product.left[place], product.right[place]]
        return found

    def balance(self, parts: Tensor) -> None:
        """Say that as many channels must stay in each row of ids [P, m]."""
        if parts.shape[0] > 1:
            self.graph.balanced.append(parts)

    def match(self, left: Tensor, right: Tensor, reason: str) -> None:
        """Say that the channels of two rows can only go together; they stay where they do not."""
        left, right = compact(left).reshape(-1), compact(right).reshape(-1)
        if not torch.equal(left, right):
            self.graph.matched.append(Match(left, right, reason))

    def pin(self, ids: Tensor, reason: str) -> None:
        ids = compact(ids).unique()
        ids = ids[ids != PIN]
        if ids.numel():
            self.graph.pins.append(Pin(ids, reason))

    def axes(self, view: ParameterView, dim: int, ids: Tensor) -> None:
        """As `axis`, of all the parameters that lie so."""
        for name in view.names:
            self.axis(name, dim, ids)

    def axis(self, name: str, dim: int, ids: Tensor) -> None:
        """Say that a parameter's dimension follows these channels; ids [groups, n] where it follows
        others in each group of rows. A parameter used twice ties its two uses.
        """
        self.used.add(name)
        known = self.graph.axes.setdefault((name, dim), ids)
        self.tie(known, ids)

    def use_whole(self, tensor: object) -> None:
        """Say that a parameter is used in a way that allows none of its positions to go."""
        view = self.view_or_function(tensor)
        if view is not None:
            self.used.update(view.names)
            self.whole.update(view.names)

    def finish(self) -> Graph:
        """Pin what follows parameters that are used whole, and hand over the graph."""
        self.finished = True
        for (name, _), ids in list(self.graph.axes.items()):
            if name in self.whole:
                self.pin(ids, f"{name} is also used in a way that is not known")
        return self.graph

    def channels(self, value: Value, dim: int) -> Tensor:
        """Ids per index of `dim`. Where several channels share an index (a concatenation along the
        height), they are tied; where all share each, none can go.
        """
        line = along(value.ids, dim)
        if line is None:
            if dim not in varying_dims(value.ids):
                self.pin(value.ids, "read along another dimension than that of its channels")
            rows = compact(value.ids).movedim(dim, 0).flatten(1)
            self.tie(rows[:, :1].expand_as(rows), rows)
            line = rows[:, 0].expand(value.ids.shape[dim])
        return line


def pinned_ids(tensor: Tensor) -> Tensor:
    """PIN for every element of `tensor`, at no memory."""
    return torch.full((), PIN, device="cpu").expand(tensor.shape)


def spread(ids: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """A row of ids laid along `dim` of an activation of `shape`."""
    view = [1] * len(shape)
    view[dim] = ids.numel()
    return ids.view(view).expand(shape)
