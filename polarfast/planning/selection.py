"""Which channels stay: thresholds, limits, equal groups, and layers that would lose everything."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..folding.fold import fold_constants
from ..folding.replay import Fold
from ..inputs import Inputs
from ..layers import can_be_silent
from ..tracing.classes import Channels
from ..tracing.graph import PIN, Ragged
from .limits import Limits, bound_of

#: Why a channel is added back to a layer that would otherwise be empty.
LAST = "would lose everything: the strongest channel stays"
EQUAL = "equal groups or chunks"
#: Works out the constant channels that a selection calls for.
Constants = Callable[["Selection"], Fold]


class Selection:
    """The classes that stay, under the limits asked for. Channels are only ever added back, never
    dropped by a limit.

    Attributes:
        stays: bool [graph.count] by class label.
        strength: float32 [graph.count] by class label: its strongest score; −1: it has none.
        unread: layers that lost what nothing reads any more.
        first: channels that the thresholds left, of each layer.
        added: γ name -> why channels came back -> how many.
    """

    def __init__(self, channels: Channels, names: Iterable[str]) -> None:
        """Everything stays. `names`: the layers (γ names) that may lose channels."""
        self.channels, self.graph = channels, channels.graph
        self.layers = {name: channels.layers[name] for name in names}
        self._all = Ragged(list(self.layers.values()))
        others = [labels for name, labels in channels.layers.items() if name not in self.layers]
        self._left_out = Ragged(others).flat
        self._repeats = {n for n, ids in self.layers.items() if ids.unique().numel() < ids.numel()}
        label = channels.label
        calls = [call for call in self.graph.projections if not call.depthwise]
        self._read = Ragged([label[call.inputs] for call in calls])
        self._written = Ragged([label[call.outputs] for call in calls])
        self._rows = Ragged([row for rows in channels.balanced for row in rows])
        put_back = [label[channels.calls[name].inputs] for name in channels.boundaries]
        self._untouchable = Ragged([*put_back, self._left_out]).flat
        self._reset()

    def _reset(self) -> None:
        self.strength = torch.full((self.graph.count,), -1.0, dtype=torch.float32, device="cpu")
        self.stays = ~self.graph.mask()
        self._dropped = self.graph.mask()
        self.unread: list[str] = []
        self.added: dict[str, dict[str, int]] = {name: {} for name in self.layers}
        self.first: list[int] = list(self._all.sizes)

    def anew(self) -> "Selection":
        """One in which everything stays, of the same layers."""
        other = copy.copy(self)
        other._reset()
        return other

    def cut(self, scores: Mapping[str, Tensor], thresholds: Mapping[str, float | None]) -> None:
        """Remove the classes all of whose γ are at or under their layer's threshold (None: the
        layer loses nothing).

        Args:
            scores: γ name -> float32 [C] >= 0 on the CPU, what is compared with the threshold.
            thresholds: γ name -> threshold.
        """
        flat, score = self._all.flat, torch.cat([scores[name] for name in self.layers])
        # A coupled channel is as strong as the strongest γ that writes it.
        self.strength.scatter_reduce_(0, flat, score, "amax")
        bounds = [bound_of(thresholds.get(name)) for name in self.layers]
        bound = torch.tensor(bounds, dtype=torch.float32, device="cpu")[self._all.rows]
        self.stays = ~self.graph.mask()
        self.stays[flat] = False
        self.stays[flat[score > bound]] = True
        self.stays[self._left_out] = True
        self.stays[PIN] = True
        self.first = self.counts()

    def adopt(self, kept: Mapping[str, Tensor]) -> None:
        """Keep exactly the channels of a plan.

        Raises:
            PlanError: the plan keeps a channel in one layer and removes it in another that it is
                coupled with.
        """
        stays = ~self.graph.mask()
        for labels in self.layers.values():
            stays[labels] = False
        for name, labels in self.layers.items():
            stays[labels[kept[name]]] = True
        stays[PIN] = True
        self.stays = stays
        for name in self.layers:
            if self.count(name) != kept[name].numel():
                raise PlanError(
                    f"the plan removes channels of {name} that must stay, or that it keeps in a "
                    "layer they are coupled with: "
                    "make the plan anew for this model"
                )

    def alive(self) -> Tensor:
        """bool [graph.count]: the ids that stay."""
        return self.stays[self.channels.label]

    def staying(self, constant: Set[int]) -> Tensor:
        """bool [graph.count] by class label: `stays`, and the classes of constant channels."""
        stays = self.stays.clone()
        stays[list(constant)] = True
        return stays

    def only(self, places: Mapping[str, int]) -> Tensor:
        """bool [graph.count] by class label: of each layer just the channel at this place, and what
        may not be removed.
        """
        stays = ~self.graph.mask()
        stays[self._all.flat] = False
        stays[[int(labels[places[name]]) for name, labels in self.layers.items()]] = True
        stays[self._left_out] = stays[PIN] = True
        return stays

    def kept(self) -> dict[str, Tensor]:
        """γ name -> sorted kept channels."""
        return {
            name: self.stays[labels].nonzero().flatten() for name, labels in self.layers.items()
        }

    def positions(self, classes: set[int]) -> dict[str, list[int]]:
        """γ name -> the layer's channels that belong to the given classes."""
        mask = self.graph.mask(classes)
        found: dict[str, list[int]] = {name: [] for name in self.layers}
        for name, width in self.widths(classes).items():
            if width:
                found[name] = mask[self.layers[name]].nonzero().flatten().tolist()
        return found

    def widths(self, classes: set[int]) -> dict[str, int]:
        """γ name -> how many of the layer's channels belong to the given classes."""
        mask = self.graph.mask(classes)
        return dict(zip(self.layers, self._all.counts(mask).tolist(), strict=True))

    def counts(self) -> list[int]:
        """Channels that stay, of each layer."""
        return self._all.counts(self.stays).tolist()

    def count(self, name: str) -> int:
        """Channels of a layer that stay."""
        return int(self.stays[self.layers[name]].sum())

    def restore(self, name: str, wanted: int, why: str) -> bool:
        """Add back a layer's strongest removed channels until `wanted` stay; whether that changed
        anything. Of equal ones the first come first.
        """
        labels = self.layers[name]
        gone = labels[~self.stays[labels]]
        missing = min(wanted - labels.numel() + gone.numel(), gone.numel())
        if missing <= 0:
            return False
        order = gone[self.strength[gone].argsort(descending=True, stable=True)]
        if name in self._repeats:  # a class has several channels in this layer
            chosen, came = _enough(order.tolist(), missing)
        else:
            chosen, came = order[:missing].tolist(), missing
        self.stays[chosen] = True
        self.note_added(name, came, why)
        return True

    def note_added(self, name: str, number: int, why: str) -> None:
        """Remember that a layer got channels back."""
        self.added[name][why] = self.added[name].get(why, 0) + number

    def keep_paths(self, can_vanish: Callable[[Tensor], bool]) -> None:
        """Give its strongest channel back to every layer without which the input would not reach an
        output.
        """
        for name in self._emptied(self.layers):
            if not can_vanish(self._mask(name)):
                self.restore(name, 1, LAST)
        emptied = self._emptied(self.layers)
        # Strongest first, so that of several parallel ways the one that matters most is kept open.
        emptied.sort(key=lambda name: -float(self.strength[self.layers[name]].max()))
        node = {name: self.channels.calls[name].node for name in emptied}
        empty = list(emptied)
        for name in emptied:
            others = {node[other] for other in empty if other != name}
            if not self.graph.reachable({node[name]}) or (
                not self.graph.reachable(others | {node[name]}) and self.graph.reachable(others)
            ):
                self.restore(name, 1, LAST)
                empty = self._emptied(empty)
        for name in emptied:
            if self.graph.reachable({node[other] for other in empty}):
                break
            self.restore(name, 1, LAST)
            empty = self._emptied(empty)

    def _emptied(self, names: Iterable[str]) -> list[str]:
        empty = {n for n, left in zip(self.layers, self.counts(), strict=True) if left == 0}
        return [name for name in names if name in empty]

    def _mask(self, name: str) -> Tensor:
        mask = self.graph.mask()
        mask[self.layers[name]] = True
        return mask

    def limit(
        self, limits: Limits, widths: Mapping[str, int], constant: Set[int] = frozenset()
    ) -> None:
        """Hold every layer that keeps anything to the limits, and groups and chunks to the same
        size.

        Args:
            widths: γ name -> number of constant channels, which count as width.
            constant: their classes.
        """
        changed = True
        while changed:  # coupled layers share channels: restoring for one changes the other
            changed = self._balance(constant)
            counts = self.counts()
            for row, (name, full) in enumerate(zip(self.layers, self._all.sizes, strict=True)):
                extra = widths.get(name, 0)
                if self._wanted(name, counts[row], full, limits, extra) > counts[row]:
                    now = self.count(name)  # more may have come back since
                    self._add_back(name, self._wanted(name, now, full, limits, extra), limits)
                    changed = True

    def _balance(self, constant: Set[int]) -> bool:
        """Add channels back until groups and chunks are equal in size; whether any came back."""
        counts = iter(self._rows.counts(self.staying(constant)).tolist())
        unequal = [rows for rows in self.channels.balanced if len({next(counts) for _ in rows}) > 1]
        labels = to_restore(unequal, self.stays, self.strength, constant)
        if not labels:
            return False
        before = self.counts()
        self.stays[labels] = True
        for name, old, new in zip(self.layers, before, self.counts(), strict=True):
            if new > old:
                self.note_added(name, new - old, EQUAL)
        return True

    def _wanted(self, name: str, kept: int, full: int, limits: Limits, extra: int) -> int:
        if kept == 0 and name in self.unread:
            return 0
        wanted, multiple = max(kept, limits.least[name]), limits.round_to[name]
        wanted = -(-(wanted + extra) // multiple) * multiple - extra
        # Instead of a constant channel, the channel itself.
        return full if extra and wanted + extra >= full else min(wanted, full)

    def _add_back(self, name: str, wanted: int, limits: Limits) -> None:
        if self.count(name) == 0 and self.unread:  # what fed this layer is read again
            self.stays |= self._dropped
            self._dropped = self.graph.mask()
            self.unread = []
        if limits.least[name]:
            self.restore(name, min(limits.least[name], wanted), limits.why[name])
        self.restore(name, wanted, "round_to")

    def drop_unread(self, can_vanish: Callable[[Tensor], bool]) -> None:
        """Remove what only emptied layers read (the front of a branch that disappears)."""
        known = self.graph.mask()
        known[self._read.flat] = True
        known[self._untouchable] = known[PIN] = False
        dropped = self._dropped.clone()
        while True:
            read = self.graph.mask()
            read[self._read.of(self._written.counts(self.stays) > 0)] = True
            useless = self.stays & known & ~read
            if bool(useless.any()):
                spare(self.channels.balanced, self.stays, useless)
            if not bool(useless.any()) or not can_vanish(useless):
                break
            self.stays[useless] = False
            dropped |= useless
        self._dropped = dropped
        hit = self._all.counts(dropped).tolist()
        self.unread = [name for name, lost in zip(self.layers, hit, strict=True) if lost]


def _enough(labels: list[int], missing: int) -> tuple[list[int], int]:
    """The first classes that make up so many channels, and how many these are."""
    width = Counter(labels)
    chosen, came = [], 0
    for label in width:  # in order of first appearance
        if came >= missing:
            break
        chosen.append(label)
        came += width[label]
    return chosen, came


class Chooser:
    """Chooses channels in a network traced once.

    Args:
        model: the network, not wrapped.
        channels: its channel classes.
        inputs: what to run it on.
        names: layers that may lose channels.
        fold: as in `plan`.
        limits: of these layers.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        inputs: Inputs,
        names: Iterable[str],
        fold: str,
        limits: Limits,
    ) -> None:
        self.model, self.channels, self.inputs, self.fold = model, channels, inputs, fold
        self.limits = limits
        self._vanishing = can_vanish(model, channels)
        self._whole = Selection(channels, names)

    def under(self, limits: Limits) -> "Chooser":
        """The same under other limits."""
        other = copy.copy(self)
        other.limits = limits
        return other

    def choose(
        self,
        compared: Mapping[str, Tensor],
        bounds: Mapping[str, float | None],
        constants: Constants | None = None,
    ) -> tuple[Selection, Fold]:
        """The channels that stay, and the constants of those that go.

        Args:
            compared: name -> float32 [C] on the CPU, what is compared with the thresholds.
            bounds: name -> threshold.
            constants: by default, the network is run to find them.
        """
        choice = self._whole.anew()
        choice.cut(compared, bounds)
        choice.limit(self.limits.unrounded(), {})
        choice.keep_paths(self._vanishing)
        choice.limit(self.limits.unrounded(), {})
        choice.drop_unread(self._vanishing)
        return choice, self.settle(choice, self.constants if constants is None else constants)

    def settle(self, choice: Selection, constants: Constants) -> Fold:
        """Add channels back until all limits hold, in place; the constants of those that are gone
        for good.
        """
        while True:  # widths count constant channels, and adding channels back changes which
            folded = constants(choice)
            before, unread = choice.stays.clone(), choice.unread
            choice.limit(self.limits, choice.widths(folded.constant), folded.constant)
            if torch.equal(before, choice.stays):
                return folded
            if choice.unread != unread:
                choice.drop_unread(self._vanishing)

    def constants(self, choice: Selection) -> Fold:
        """The constants that removed channels leave behind, read off the network."""
        kept, alive = choice.kept(), choice.alive()
        return fold_constants(self.model, self.channels, kept, alive, self.inputs, self.fold)


def can_vanish(model: nn.Module, channels: Channels) -> Callable[[Tensor], bool]:
    """Whether some classes (bool [graph.count] by label) may all go: everything around them must
    work on no channels at all.
    """
    graph, label = channels.graph, channels.label
    pooled = graph.mask()
    for ids in graph.pooled:
        pooled[label[ids]] = True
    touched = graph.mask()  # classes around which something refuses to work on nothing
    owners: dict[str, bool] = {}
    for (tensor, _), ids in graph.axes.items():
        owner = tensor.rpartition(".")[0]
        if owner not in owners:
            owners[owner] = can_be_silent(model.get_submodule(owner))
        if not owners[owner]:
            touched[label[ids]] = True
    refused = pooled | touched
    return lambda mask: not bool((refused & mask).any())


def to_restore(
    balanced: Sequence[Tensor], stays: Tensor, strength: Tensor, constant: Set[int] = frozenset()
) -> list[int]:
    """Removed classes to add back, the strongest first, until as many stay in each row.

    Args:
        balanced: class labels [P, m] each: as many must stay in each of the P rows.
        stays: bool, by class.
        strength: float, by class.
        constant: classes of constant channels, which count as staying.
    """
    there = stays.clone()
    there[list(constant)] = True
    found: list[int] = []
    changed = bool(balanced)
    while changed:  # a class may be in several rows, and in rows of others
        changed = False
        for rows in balanced:
            missing = _missing(rows, there, strength)
            if missing.numel():
                there[missing] = changed = True
                found += missing.tolist()
    return found


def _missing(rows: Tensor, there: Tensor, strength: Tensor) -> Tensor:
    """What must be added for as many in each row, the strongest first."""
    inside = there[rows]
    counts = inside.sum(1, keepdim=True)
    if bool((counts == counts[0]).all()):
        return rows.new_empty(0)
    strongest = strength[rows].masked_fill(inside, -torch.inf)
    order = strongest.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(rows.shape[1], device="cpu") < counts.max() - counts
    missing = rows.gather(1, order)[first]
    added = there.clone()
    added[missing] = True
    if bool((added[rows].sum(1) == counts.max()).all()):
        return missing
    return _one_by_one(rows, there.clone(), strength)  # a class is in several of these rows


def _one_by_one(rows: Tensor, there: Tensor, strength: Tensor) -> Tensor:
    found = []
    for row in rows:
        while int(there[row].sum()) < int(there[rows].sum(1).max()):
            gone = row[~there[row]]
            found.append(gone[strength[gone].argmax()])
            there[found[-1]] = True
    return torch.stack(found)


def spare(balanced: Sequence[Tensor], stays: Tensor, useless: Tensor) -> None:
    """Leave out of `useless` (bool, by class; in place) what would have to come back, because
    others of its rows stay.
    """
    changed = True
    while changed:
        changed = False
        for rows in balanced:
            mine = rows[stays[rows]]
            if bool(useless[mine].any()) and not bool(useless[mine].all()):
                useless[mine] = False
                changed = True


def is_balanced(rows: Tensor, stays: Tensor) -> bool:
    """Whether as many classes stay in each row."""
    counts = stays[rows].sum(1)
    return bool(torch.equal(counts, counts[:1].expand_as(counts)))
