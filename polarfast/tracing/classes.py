"""From a traced graph to channel classes: what stays or goes together, and whose γ decides; and how
long they hold.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TracingError
from ..layers import can_put_back, puts_back
from ..sharding import refuse_sharded
from .dryrun import trace
from .graph import PIN, Addition, Graph, Macs, Match, NormCall, ProjectionCall, Ragged

#: What may happen to channels that meet in an addition.
RESIDUAL_MODES = ("keep", "expand", "expand-all", "couple")
#: Those in which norms put their channels back.
PUTTING_BACK = ("expand", "expand-all")

WITH_THE_LAYER_BEFORE = "its channels are those of the layer before the depthwise convolution"
UNRUN = "did not run on the example inputs"
FACTOR = "its channels are multiplied with others that its γ does not make 0, and these are read"
STEM = "is the stem of a residual network"
MEETS = {
    "keep": "its channels meet in an addition (residual='expand' or 'couple' can prune them)",
    "expand": "its channels are a shortcut that meets an addition (residual='expand-all' can prune "
    "them)",
    "expand-all": "its channels meet in an addition",
    "couple": "its channels meet in an addition with channels that must stay",
}


def trace_channels(
    model: nn.Module, example_inputs: Any, residual: str, with_operations: bool = False
) -> "Channels":
    """Trace an (unwrapped) model and sort its channels into classes.

    Args:
        with_operations: as for `trace`.

    Raises:
        ArgumentError: the model is sharded.
        TracingError: as in `trace`.
    """
    refuse_sharded(model)
    lazy = [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise TracingError(
            f"{lazy[0]} has no size yet (a lazy layer): run the model once on an example, or take "
            "a layer that never runs off it, before its channels are looked at"
        )

    def norm(scale: str) -> nn.Module:
        return model.get_submodule(scale.rpartition(".")[0])

    return Channels(
        trace(model, example_inputs, with_operations),
        residual,
        lambda scale: can_put_back(norm(scale)),
        lambda scale: puts_back(norm(scale)),
    )


class Channels:
    """The channel classes of a graph under one residual mode.

    A class is a set of ids that must be kept or removed together. A normalization (or a gate)
    *takes part* iff it alone reads every channel that it normalizes: then γ = 0 makes the channel a
    constant, and its class can go. Norms that read the same channels (one for each level of a
    pyramid, or each domain) take part together: a channel goes where all of their γ are 0. Where
    there is a gate, γ below means the gate.

    Attributes:
        graph, residual: what this was made from.
        boundaries: γ of norms whose output is put back to full width ("expand", "expand-all", and
            in a slim model made so).
        label: int64 [graph.count], the class of each id; PIN: must stay.
        layers: γ name -> class of each of its channels, int64 [C]; the norms that take part, in
            order of execution.
        pinned: γ name -> why it does not take part; the reason that costs most first, as in
            `pinned_macs`.
    """

    def __init__(
        self,
        graph: Graph,
        residual: str,
        can_put_back: Callable[[str], bool],
        puts_back: Callable[[str], bool],
    ) -> None:
        self.graph, self.residual = graph, residual
        self._raw = graph.labels()
        self.calls: dict[str, NormCall] = {}
        for call in graph.norms:
            if call.scale is not None:
                self.calls.setdefault(call.scale, call)
        self._alone = {name for name, call in self.calls.items() if self._reads_alone(name, call)}
        self._meeting, self._branches = self._sort_additions()
        self.boundaries = frozenset(filter(puts_back, self._alone))
        if residual in PUTTING_BACK:
            self.boundaries |= self._find_boundaries(can_put_back)
        self.label = self._classes()
        #: class labels [P, m]: as many must stay in each row
        self.balanced = self._find_balanced()
        self.layers: dict[str, Tensor] = {}
        self._reasons: dict[str, str] = {}
        for name, call in self.calls.items():
            reason = self._why_not(name, call)
            if reason is None:
                self.layers[name] = self.label[call.inputs]
            else:
                self._reasons[name] = reason
        for parameter in graph.unrun.values():
            self._reasons.setdefault(parameter, UNRUN)

    # --- who reads and writes what

    @cached_property
    def _readers(self) -> tuple[Tensor, Tensor, list[str]]:
        """Smallest and largest reader of each raw label (as an index into the list of readers)."""
        names: list[str] = []
        number: dict[str, int] = {}
        beyond = len(self.graph.projections) + len(self.graph.norms)
        low = torch.full((self.graph.count,), beyond, device="cpu")
        high = torch.full((self.graph.count,), -1, device="cpu")
        # Through a depthwise convolution a channel stays itself: who reads its output counts.
        through = [call for call in self.graph.projections if not call.depthwise]
        calls: list[ProjectionCall | NormCall] = [*through, *self.graph.norms]
        for call in calls:
            name = (
                self._siblings.get(call.scale or "", call.scale)
                if isinstance(call, NormCall)
                else call.weight
            ) or f"a normalization without weights over {call.inputs.numel()} channels"
            if name not in number:
                number[name] = len(names)
                names.append(name)
            labels = self._raw[call.inputs]
            low[labels] = low[labels].clamp(max=number[name])
            high[labels] = high[labels].clamp(min=number[name])
        return low, high, names

    @cached_property
    def _siblings(self) -> dict[str, str]:
        """Norm -> the first norm that reads exactly the same channels, for norms that have others
        beside them, behind one module.
        """
        known: dict[tuple[int, ...], list[str]] = {}
        for name, call in self.calls.items():
            writer = None if call.source is None else self.graph.projections[call.source].weight
            if writer is None or writer in self.graph.tied:
                continue
            known.setdefault(tuple(self._raw[call.inputs].tolist()), []).append(name)
        return {name: names[0] for names in known.values() if len(names) > 1 for name in names}

    @cached_property
    def _written(self) -> Tensor:
        """Whether a raw label is written by a convolution or linear layer, or a product of one."""
        written = self.graph.mask()
        for call in self.graph.projections:
            if not call.depthwise:
                written[self._raw[call.outputs]] = True
        for product in self.graph.products:
            sides = written[self._raw[product.left]] | written[self._raw[product.right]]
            written[self._raw[product.out[sides]]] = True
        written[PIN] = False
        return written

    def _reads_alone(self, name: str, call: NormCall) -> bool:
        low, high, names = self._readers
        labels = self._raw[call.inputs]
        me = names.index(self._siblings.get(name, name))
        return bool((self._written[labels] & (low[labels] == me) & (high[labels] == me)).all())

    def _sort_additions(self) -> tuple[list[Addition], list[Addition]]:
        """The additions in which different channels meet; and of these the sums of parallel
        branches, one convolution and norm each, that read the same channels (RepVGG, MobileOne).
        """
        linked = self.graph.labels(self.graph.links())
        meeting = [
            add
            for add in self.graph.additions
            if not torch.equal(linked[add.left], linked[add.right])  # x + depthwise(x): the same
        ]
        reads = torch.full((self.graph.count,), -1, device="cpu")
        known: dict[tuple[int, ...], int] = {}
        for name in self._alone:
            norm = self.calls[name]
            if norm.source is not None:
                source = self.graph.projections[norm.source]
                key = known.setdefault(tuple(self._raw[source.inputs].tolist()), len(known))
                reads[self._raw[norm.outputs]] = key
        branches = []
        for add in meeting:
            read = reads[self._raw[torch.cat((add.left, add.right))]]
            if bool((read == read[0]).all()) and int(read[0]) >= 0:
                branches.append(add)
        return meeting, branches

    def _find_boundaries(self, can_put_back: Callable[[str], bool]) -> frozenset[str]:
        """Norms that end a branch: what they write, or the sum of parallel branches that it is part
        of, is the deeper operand of an addition ("expand-all": either operand).
        """
        # A norm that others read beside takes its channels along: what it normalizes begins or ends
        # there as well.
        along = self.graph.links(frozenset(self._alone))
        label = self.graph.labels(self._branch_edges(), along)
        either = self.residual == "expand-all"
        put_back = self.graph.mask()
        for add in self._meeting:
            if add not in self._branches:
                if either or add.left_depth >= add.right_depth:
                    put_back[label[add.left]] = True
                if either or add.right_depth >= add.left_depth:
                    put_back[label[add.right]] = True
        for product in reversed(self.graph.products):  # a branch may end in one
            added = put_back[label[product.out]]
            for side in (product.left, product.right):
                put_back[label[side[added]]] = True
        put_back[PIN] = False
        return frozenset(
            name
            for name in self._alone
            if bool(put_back[label[self.calls[name].outputs]].any()) and can_put_back(name)
        )

    def _branch_edges(self) -> list[Tensor]:
        """A channel of a sum of parallel branches goes iff it goes in all of them."""
        return [torch.stack((add.left, add.right)) for add in self._branches]

    @cached_property
    def axes(self) -> Ragged:
        """The ids along `graph.axes`, in their order."""
        return Ragged(list(self.graph.axes.values()))

    def in_classes(self, labels: Iterable[int]) -> Tensor:
        """bool [graph.count]: the ids of the given classes."""
        return self.graph.mask(labels)[self.label]

    def sole_norm(self, index: int) -> NormCall | None:
        """The norm that alone reads what a call (by index) writes, and reads it untouched."""
        for norm in self.graph.norms:
            if norm.source == index and norm.scale in self._alone and norm.normalizes:
                return None if norm.scale in self._siblings else norm
        return None

    # --- classes

    def _classes(self) -> Tensor:
        graph = self.graph
        edges = [*graph.links(self.boundaries), *graph.pin_edges()]
        if self.residual == "couple":
            edges += graph.addition_edges()
        else:
            parallel = self._branches if self.residual in PUTTING_BACK else []
            edges += [torch.stack((add.left, add.right)) for add in parallel]
            stay = [add for add in self._meeting if add not in parallel]
            edges += [_to_pin(ids) for add in stay for ids in (add.left, add.right)]
        self._meets = self._in_addition()
        edges += [_to_pin(self.calls[name].inputs) for name in self._stems()]
        self.mismatched: list[Match] = []
        while True:  # pinning one side of a match may break another
            label = self._pin_uncovered(edges)
            broken = [match for match in graph.matched if not _matches(label, match)]
            if not broken:
                return label
            self.mismatched += broken
            edges += [_to_pin(ids) for match in broken for ids in (match.left, match.right)]

    def _find_balanced(self) -> list[Tensor]:
        """Rows of classes of which as many must stay in each, where any can go."""
        found = [self.label[rows] for rows in self.graph.balanced]
        return [rows for rows in found if bool((rows != PIN).any())]

    @cached_property
    def _residual(self) -> bool:
        """Whether any addition joins a branch and a shortcut, which is shorter; not where no γ
        decides on either and one must stay in any case, as in a transformer.
        """
        label = self.graph.labels(self.graph.links(), self.graph.product_edges())
        decided = self.graph.mask()
        for name in self._alone:
            decided[label[self.calls[name].outputs]] = True
        decided[PIN] = False
        free = self.graph.labels(self.graph.links(), self.graph.pin_edges()) != PIN
        return any(
            add.left_depth != add.right_depth
            and bool(
                decided[label[torch.cat((add.left, add.right))]].any()
                or (free[add.left].any() and free[add.right].any())
            )
            for add in self._meeting
        )

    def _in_addition(self) -> Tensor:
        meets = self.graph.mask()
        label = self.graph.labels(
            self.graph.links(self.boundaries),
            self.graph.addition_edges(),
            self.graph.product_edges(),
        )
        for add in self._meeting:
            meets[label[add.left]] = meets[label[add.right]] = True
        return meets[label]

    def _stems(self) -> set[str]:
        """In a residual network the first norms stay, unless coupled with others."""
        if not self._residual:
            return set()
        return {
            name
            for name, call in self.calls.items()
            if call.depth <= 1 and not self._meets[call.outputs].any()
        }

    def _pin_uncovered(self, edges: list[Tensor]) -> Tensor:
        """Pin classes into which something without a γ adds.

        Channels joined by multiplications may go iff γ decides, wholly, of every factor or product
        among them that a convolution or linear layer reads.
        """
        graph = self.graph
        factor, joined = graph.labels(edges), graph.labels(edges, graph.product_edges())
        read = graph.mask()
        undecided = self._undecided(factor)
        for call in graph.projections:
            if not call.depthwise:
                read[call.inputs] = True
        goes, stays = graph.mask(), graph.mask()
        goes[joined[self._written[self._raw] & ~undecided[factor]]] = True
        stays[joined[read & undecided[factor]]] = True
        self._decided_factor = ~undecided[factor]
        return torch.where((goes & ~stays)[joined], joined, PIN)

    def _undecided(self, factor: Tensor) -> Tensor:
        """bool [graph.count]: labels of `factor` of which γ does not wholly decide: something that
        no norm of its own reads adds to them, or a product that is not 0 where a factor of it is.
        """
        graph = self.graph
        by_norm = graph.mask()
        for name in self._alone:
            by_norm[self._raw[self.calls[name].inputs]] = True
        normed = by_norm[self._raw]  # before its norm a channel is not 0
        undecided = graph.mask()
        for call in graph.projections:
            if not call.depthwise:
                undecided[factor[call.outputs[~normed[call.outputs]]]] = True
        while True:
            before = int(undecided.sum())
            for product in graph.products:
                open_ = ~normed[product.out]
                for side, zero in (
                    (product.left, product.left_zero),
                    (product.right, product.right_zero),
                ):
                    open_ &= undecided[factor[side]] | normed[side] | (not zero)
                undecided[factor[product.out[open_]]] = True
            if int(undecided.sum()) == before:
                return undecided

    # --- reasons

    @cached_property
    def pinned(self) -> dict[str, str]:
        ranks = {reason: rank for rank, reason in enumerate(self.pinned_macs)}
        return dict(sorted(self._reasons.items(), key=lambda item: ranks[item[1]]))

    @cached_property
    def pinned_macs(self) -> dict[str, float]:
        """Reason -> the share of all multiply-accumulates that it keeps from being cut, the largest
        first: what would go beside all that can, every channel that takes part gone, if also the
        channels that are pinned for this reason went, with those that meet them in additions and
        products. Two reasons may keep the same layer; channels that go with the layer before keep
        none.
        """
        graph = self.graph
        meeting = [*graph.product_edges(), *graph.addition_edges()]
        together = graph.labels(
            graph.links(self.boundaries), [pairs[:, (pairs != PIN).all(0)] for pairs in meeting]
        )
        takes_part = graph.mask()
        for labels in self.layers.values():
            takes_part[labels] = True
        takes_part[PIN] = False
        stays = ~takes_part[self.label]
        macs = Macs(graph, torch.arange(graph.count, device="cpu"))
        full, least = macs(torch.ones_like(stays)), macs(stays)
        shares = dict.fromkeys(self._reasons.values(), 0.0)
        for reason in shares:
            mine = graph.mask()
            for name, why in self._reasons.items():
                if why == reason and why not in (UNRUN, WITH_THE_LAYER_BEFORE):
                    mine[together[self.calls[name].inputs]] = True
            mine[PIN] = False
            shares[reason] = (least - macs(stays & ~mine[together])) / max(full, 1)
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def _why_not(self, name: str, call: NormCall) -> str | None:
        """Why a norm does not take part; None if it does."""
        free = (self.label[call.inputs] != PIN) & self._decided_factor[call.inputs]
        if name in self._alone and bool(free.any()):
            return None
        for found in (
            self._unwritten,
            self._shared,
            self._pin_reason,
            self._stem_or_addition,
            self._multiplied,
        ):
            reason = found(call)
            if reason is not None:
                return reason
        return "something that has no scaling factor is added to its channels"

    def _unwritten(self, call: NormCall) -> str | None:
        if bool(self._written[self._raw[call.inputs]].all()):
            return None
        if any(
            len(c.inputs) == len(call.inputs)
            and c.depthwise
            and torch.equal(c.outputs, call.inputs)
            for c in self.graph.projections
        ):
            return WITH_THE_LAYER_BEFORE
        return "normalizes what no single convolution or linear layer writes (a sum, or the input)"

    def _shared(self, call: NormCall) -> str | None:
        name = call.scale
        if name in self._alone:
            return None
        low, high, names = self._readers
        labels = self._raw[call.inputs]
        others = {
            names[i] for i in (*low[labels].tolist(), *high[labels].tolist()) if names[i] != name
        }
        return (
            f"its channels are read by others too ({', '.join(sorted(others)[:2])})"
            if others
            else None
        )

    @cached_property
    def _joined(self) -> Tensor:
        """Labels of what goes together through norms and products; through products with what must
        stay not, which say nothing about why.
        """
        products = [pairs[:, (pairs != PIN).all(0)] for pairs in self.graph.product_edges()]
        return self.graph.labels(self.graph.links(self.boundaries), products)

    def _pin_reason(self, call: NormCall) -> str | None:
        label = self._joined
        mine = self.graph.mask()
        mine[label[call.inputs]] = True
        mine[PIN] = False
        pins = [(pin.ids, pin.reason) for pin in self.graph.pins]
        pins += [(torch.cat((m.left, m.right)), m.reason) for m in self.mismatched]
        for ids, reason in pins:
            if bool(mine[label[ids]].any()):
                return reason
        return None

    def _stem_or_addition(self, call: NormCall) -> str | None:
        if bool(self._meets[call.outputs].any()):
            return MEETS[self.residual]
        return STEM if call.depth <= 1 and self._residual else None

    def _multiplied(self, call: NormCall) -> str | None:
        of_products = self.graph.mask()
        for product in self.graph.products:
            of_products[self._joined[product.out]] = True
        return FACTOR if bool(of_products[self._joined[call.outputs]].any()) else None


def _matches(label: Tensor, match: Match) -> bool:
    """Whether two rows hold the same classes, in any order."""
    return bool(torch.equal(label[match.left].sort().values, label[match.right].sort().values))


def _to_pin(ids: Tensor) -> Tensor:
    return torch.stack((torch.full_like(ids, PIN), ids))


class Traced:
    """The channels of a model. Valid for the very same model while the names and types of its
    modules and the names and shapes of their tensors are what they were.

    What else its code may go by (attributes, hooks, flags) is not looked at: a slim model built
    from a trace that no longer holds does not pass its verification. Keeps neither the model nor
    any of its tensors alive.

    Attributes:
        channels: the channel classes.
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.channels = channels
        self._model = weakref.ref(model)
        self._signature = _signature(model)

    @property
    def model(self) -> nn.Module | None:
        """The model, while anyone else keeps it."""
        return self._model()

    def fits(self, model: nn.Module) -> bool:
        """Whether this is valid for a model."""
        return self._model() is model and self._signature == _signature(model)


def _signature(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            type(module),
            *(
                (key, None if tensor is None else tensor.shape)
                for store in (module._parameters, module._buffers)
                for key, tensor in store.items()
            ),
        )
        for name, module in model.named_modules()
    ]
