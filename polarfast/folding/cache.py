"""A fold that a plan keeps, so that `slim` need not run the network again: `Folded`."""

import torch
from torch import Tensor, nn

from ..copies import tensors_of_model
from ..tracing.classes import Channels
from .replay import Fold


class Folded:
    """The constants of removed channels. Valid for the traced model (`Traced`) and the same removed
    channels while the values that the constants were read off, all parameters and buffers but the
    weights of convolutions and linear layers, are what they were.

    Attributes:
        fold: the constants.

    Args:
        model, channels: the network and its channel classes.
        alive: bool [graph.count], the ids that stay, without constant channels.
        fold: their fold.
        mode: what became of them ("exact", "bias", "none").
    """

    def __init__(
        self, model: nn.Module, channels: Channels, alive: Tensor, fold: Fold, mode: str
    ) -> None:
        self.fold = fold
        self._alive, self._mode = alive, mode
        self._values = {n: t.detach().clone() for n, t in _values(model, channels).items()}

    def fits(
        self, model: nn.Module, channels: Channels, alive: Tensor, forced: set[int], mode: str
    ) -> bool:
        """Whether `fold_constants`, given these, would find the same."""
        if not self.fold.lasting or (forced, mode) != (self.fold.constant, self._mode):
            return False
        # By value: edits through .data leave no other trace.
        now = _values(model, channels)
        return (
            torch.equal(alive, self._alive)
            and now.keys() == self._values.keys()
            and all(torch.equal(value, self._values[name]) for name, value in now.items())
        )


def _values(model: nn.Module, channels: Channels) -> dict[str, Tensor]:
    products = channels.graph.product_weights()
    return {name: t for name, t in tensors_of_model(model).items() if name not in products}
