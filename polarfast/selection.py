"""Which channel classes go: thresholds, limits, and layers that would lose everything."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .channels import Channels
from .errors import PlanError
from .tracing import PIN


class Selection:
    """The classes that stay, under the limits asked for. Channels are only ever added back, never
    dropped by a limit.

    Attributes:
        stays: bool [graph.count] by class label.
        notes: γ name -> what the limits did.
    """

    def __init__(self, channels: Channels, names: Iterable[str]) -> None:
        """Everything stays. `names`: the layers (γ names) that may lose channels."""
        self.channels, self.graph = channels, channels.graph
        self.layers = {name: channels.layers[name] for name in names}
        self.notes: dict[str, list[str]] = {name: [] for name in self.layers}
        self.strength = torch.full((self.graph.count,), -1.0, dtype=torch.float32, device="cpu")
        self.stays = ~self.graph.mask()

    def cut(self, scores: Mapping[str, Tensor], thresholds: Mapping[str, float | None]) -> None:
        """Remove the classes all of whose γ are at or under their layer's threshold (None: the
        layer loses nothing).

        Args:
            scores: γ name -> float [C] on the CPU, what is compared with the threshold.
            thresholds: γ name -> threshold.
        """
        stays = ~self.graph.mask()
        for name, labels in self.layers.items():
            # A coupled channel is as strong as the strongest γ that writes it.
            self.strength.scatter_reduce_(0, labels, scores[name], "amax")
            stays[labels] = False
        for name, labels in self.channels.layers.items():
            threshold = thresholds.get(name)
            stays[labels if threshold is None else labels[scores[name] > threshold]] = True
        stays[PIN] = True
        self.stays = stays
        for name, threshold in thresholds.items():
            if threshold is None:
                self.notes[name].append("no valley: nothing removed")

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

    def kept(self) -> dict[str, Tensor]:
        """γ name -> sorted kept channels."""
        return {
            name: self.stays[labels].nonzero().flatten() for name, labels in self.layers.items()
        }

    def positions(self, classes: set[int]) -> dict[str, list[int]]:
        """γ name -> the layer's channels that belong to the given classes."""
        return {
            name: [place for place, label in enumerate(labels.tolist()) if label in classes]
            for name, labels in self.layers.items()
        }

    def count(self, name: str) -> int:
        """Channels of a layer that stay."""
        return int(self.stays[self.layers[name]].sum())

    def _strongest_removed(self, name: str) -> int | None:
        labels = self.layers[name]
        gone = labels[~self.stays[labels]]
        return int(gone[self.strength[gone].argmax()]) if gone.numel() else None

    def restore(self, name: str, wanted: int) -> bool:
        """Add back a layer's strongest removed channels until `wanted` stay; whether that changed
        anything.
        """
        changed = False
        while self.count(name) < wanted and (label := self._strongest_removed(name)) is not None:
            self.stays[label] = True
            changed = True
        return changed

    def keep_paths(self, can_vanish: Callable[[Tensor], bool]) -> None:
        """Give its strongest channel back to every layer without which the input would not reach an
        output.
        """
        emptied = [name for name in self.layers if self.count(name) == 0]
        for name in emptied:
            if not can_vanish(self._mask(name)) and self.restore(name, 1):
                self.notes[name].append("would lose everything: the strongest channel stays")
        emptied = [name for name in emptied if self.count(name) == 0]
        # Strongest first, so that of several parallel ways the one that matters most is kept open.
        emptied.sort(key=lambda name: -float(self.strength[self.layers[name]].max()))
        for name in emptied:
            others = {
                self.channels.calls[other].node
                for other in emptied
                if other != name and self.count(other) == 0
            }
            if not self.graph.reachable({self.channels.calls[name].node}) or (
                not self.graph.reachable(others | {self.channels.calls[name].node})
                and self.graph.reachable(others)
            ):
                self._restore_one(name)
        for name in emptied:
            cut = {self.channels.calls[other].node for other in emptied if self.count(other) == 0}
            if self.graph.reachable(cut):
                break
            self._restore_one(name)

    def _mask(self, name: str) -> Tensor:
        mask = self.graph.mask()
        mask[self.layers[name]] = True
        return mask

    def _restore_one(self, name: str) -> None:
        if self.restore(name, 1):
            self.notes[name].append("would lose everything: the strongest channel stays")

    def limit(self, min_channels: int, round_to: int, constant: Mapping[str, int]) -> None:
        """Hold every layer that keeps anything to the limits.

        Args:
            min_channels, round_to: as in `plan`.
            constant: γ name -> number of constant channels, which count as width.
        """
        changed = True
        while changed:  # coupled layers share channels: restoring for one changes the other
            changed = False
            for name, labels in self.layers.items():
                kept, extra, full = self.count(name), constant.get(name, 0), labels.numel()
                wanted = max(kept, min_channels) if kept or min_channels > 1 else kept
                wanted = -(-(wanted + extra) // round_to) * round_to - extra
                if extra and wanted + extra >= full:
                    wanted = full  # instead of a constant channel, the channel itself
                if self.restore(name, min(wanted, full)):
                    changed = True
                    self.notes[name].append(f"{self.count(name) - kept} added back for the limits")

    def drop_unread(self, can_vanish: Callable[[Tensor], bool]) -> list[str]:
        """Remove what only emptied layers read (the front of a branch that disappears); names of
        the layers concerned.
        """
        dropped: list[str] = []
        untouchable = self.graph.mask()
        for name in self.channels.boundaries:
            untouchable[self.channels.label[self.channels.calls[name].inputs]] = True
        for name, labels in self.channels.layers.items():
            if name not in self.layers:  # left out by the user
                untouchable[labels] = True
        while True:
            alive = self.alive()
            read = self.graph.mask()
            known = read.clone()
            for call in self.graph.projections:
                if call.depthwise:
                    continue
                labels = self.channels.label[call.inputs]
                known[labels] = True
                if bool(alive[call.outputs].any()):
                    read[labels] = True
            useless = self.stays & known & ~read & ~untouchable
            useless[PIN] = False
            if not bool(useless.any()) or not can_vanish(useless):
                return dropped
            self.stays[useless] = False
            dropped += [name for name, labels in self.layers.items() if bool(useless[labels].any())]
