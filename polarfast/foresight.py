"""Constant channels foretold, so that the network need not run for every trial."""

import torch
from torch import Tensor

from .carriers import carriers
from .choosing import Chooser
from .edits import new_biases
from .fields import Fold
from .selection import Selection


class Foresight:
    """Which constant channels a selection will call for.

    Removed channels that one constant channel can stand for are a set. Until the network has been
    run, a guess that is right behind ReLU: a set needs its constant channel if a channel of it with
    β > 0 is read by a convolution with zero padding. From then on it is taken to need one whenever
    it did when it was last looked at.
    """

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self._channels = chooser, chooser.channels
        graph = self._channels.graph
        self._set = torch.full((graph.count,), -1, dtype=torch.long, device="cpu")  # by class
        carrier_of = carriers(self._channels, graph.mask())
        self._set[list(carrier_of)] = torch.tensor(
            list(carrier_of.values()), dtype=torch.long, device="cpu"
        )
        self._shows = self._guess() if chooser.fold == "exact" else graph.mask()
        self._looked_at, self._needed = graph.mask(), graph.mask()  # by set
        self._biased: list[Tensor] = []  # classes of the channels of each created bias

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
        gone = (~choice.stays & (self._set >= 0)).nonzero().flatten()
        sets = self._set[gone]
        first = torch.full_like(self._set, self._set.numel())
        first.scatter_reduce_(0, sets, gone, "amin")
        shows, broken = self._channels.graph.mask(), self._channels.graph.mask()
        shows[sets[self._shows[gone]]] = True
        broken[sets] = True
        needed = broken & torch.where(self._looked_at, self._needed, shows)
        return Fold(constant=set(first[needed].tolist()))

    def learn(self, choice: Selection, folded: Fold) -> bool:
        """Remember what a run of the network found; whether it was something else than expected."""
        expected, found = (
            set(self._set[list(fold.constant)].tolist())
            for fold in (self.constants(choice), folded)
        )
        gone = self._set[~choice.stays]
        self._looked_at[gone[gone >= 0]] = True
        self._needed[gone[gone >= 0]] = False
        self._needed[list(found)] = True
        before, self._biased = self._biased, self._created(folded)
        same = len(before) == len(self._biased) and all(map(torch.equal, before, self._biased))
        return expected != found or not same

    def _created(self, folded: Fold) -> list[Tensor]:
        channels = self._channels
        created = new_biases(self._chooser.model, channels, folded, ~channels.graph.mask())
        outputs = {
            reader.sink: channels.graph.projections[index].outputs
            for index, reader in folded.readers.items()
        }
        return [channels.label[outputs[name]] for name in sorted(created)]

    def new_biases(self) -> list[Tensor]:
        """For each bias that the constants will create, the classes of its channels."""
        return self._biased
