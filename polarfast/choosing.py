"""From thresholds to the channels that stay, under all limits: `Chooser`."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Channels
from .fields import Fold
from .folding import fold_constants
from .limits import Limits
from .modules import can_be_silent
from .selection import Selection

#: Works out the constant channels that a selection calls for.
Constants = Callable[[Selection], Fold]


class Chooser:
    """Chooses channels in a network traced once.

    Args:
        model: the network, not wrapped.
        channels: its channel classes.
        spec: description of the inputs.
        names: layers that may lose channels.
        fold: as in `plan`.
        limits: of these layers.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        spec: dict[str, Any],
        names: Iterable[str],
        fold: str,
        limits: Limits,
    ) -> None:
        self.model, self.channels, self.spec, self.fold = model, channels, spec, fold
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
        return fold_constants(self.model, self.channels, kept, alive, self.spec, self.fold)


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
