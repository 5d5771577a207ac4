"""Constant channels foretold, so that the network need not run for every trial."""

import torch
from torch import Tensor

from .choosing import Chooser
from .fields import Fold
from .selection import Selection
from .tracing import PIN


class Foresight:
    """Which constant channels a selection will call for.

    Until the network has been run, a guess that is right behind ReLU: a removed channel with β > 0
    calls for one where a convolution with zero padding reads it. From then on a layer that loses
    channels is taken to need as many as when it was last looked at.
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self._channels = chooser, chooser.channels
        self._known: dict[str, int] = {}
        self._biased: list[Tensor] = []  # classes of the channels of each created bias
        self._shows = self._guess() if chooser.fold == "exact" else self._channels.graph.mask()

    def _guess(self) -> Tensor:
        """bool [graph.count]: classes that are taken to need a constant channel."""
        channels, label = self._channels, self._channels.label
        padded = channels.graph.mask()
        for call in channels.graph.projections:
            if call.padded and not call.depthwise:
                padded[label[call.inputs]] = True
        positive = channels.graph.mask()
        params = dict(self._chooser.model.named_parameters())
        for name, labels in channels.layers.items():
            norm = channels.calls[name]
            if norm.gate is None and norm.bias is not None:
                positive[labels[(params[norm.bias].detach() > 0).cpu()]] = True
        return padded & positive

    def constants(self, choice: Selection) -> Fold:
        """What running the network is expected to find, of which the classes of constant channels
        are enough here.
        """
        constant: set[int] = set()
        for name, labels in choice.layers.items():
            gone = labels[~choice.stays[labels]]
            if not gone.numel():
                continue
            number = self._known.get(name)
            if number is None:
                number = int(self._shows[gone].any())
            constant.update(gone.unique()[:number].tolist())
        constant.discard(PIN)
        return Fold(constant=constant)

    def learn(self, choice: Selection, folded: Fold) -> bool:
        """Remember what a run of the network found; whether it was something else than expected."""
        expected, biased = self.constants(choice), self._biased
        found = choice.positions(folded.constant)
        for name, labels in choice.layers.items():
            if not bool(choice.stays[labels].all()):
                self._known[name] = len(found[name])
        self._biased = self._created(folded)
        was = {name: len(places) for name, places in choice.positions(expected.constant).items()}
        now = {name: len(places) for name, places in found.items()}
        same = len(biased) == len(self._biased) and all(map(torch.equal, biased, self._biased))
        return was != now or not same

    def _created(self, folded: Fold) -> list[Tensor]:
        model, graph = self._chooser.model, self._channels.graph
        existing = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        sinks = {
            reader.sink: self._channels.label[graph.projections[index].outputs]
            for index, reader in sorted(folded.readers.items())
            if reader.shift is not None and reader.sink is not None
        }
        return [labels for name, labels in sinks.items() if name not in existing]

    def new_biases(self) -> list[Tensor]:
        """For each bias that the constants will create, the classes of its channels."""
        return self._biased
