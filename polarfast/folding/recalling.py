"""What a plan was made from, handed on to `slim` so that it is not worked out twice."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..copies import tensors_of_model
from ..tracing.cache import Traced
from ..tracing.classes import Channels
from .replay import Fold


@dataclass(eq=False)
class Made:
    """The trace and the constants behind a plan.

    Attributes:
        traced: of the network.
        alive: bool [graph.count], the ids that stay, without constant channels.
        folded: the constants of the others.
        mode: what became of them ("exact", "bias", "none").
        values: the values that these depend on, by name: of all parameters and buffers but the
            weights of convolutions and linear layers.
    """

    traced: Traced
    alive: Tensor
    folded: Fold
    mode: str
    values: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, traced: Traced, alive: Tensor, folded: Fold, mode: str) -> "Made":
        """Remember a plan's making."""
        values = {
            name: tensor.detach().clone()
            for name, tensor in _values(model, traced.channels).items()
        }
        return cls(traced, alive, folded, mode, values)

    def fold_of(self, model: nn.Module, alive: Tensor, forced: set[int], mode: str) -> Fold | None:
        """The constants, if they are the same for this model now; None if that is not certain.

        Args:
            model: the one that was traced, or one that is the same to the tracer.
            alive, forced, mode: as in `fold_constants`.
        """
        if not self.folded.lasting or (forced, mode) != (self.folded.constant, self.mode):
            return None
        if not torch.equal(alive, self.alive):
            return None
        # By value: edits through .data leave no other trace.
        values = _values(model, self.traced.channels)
        same = values.keys() == self.values.keys() and all(
            torch.equal(value, self.values[name]) for name, value in values.items()
        )
        return self.folded if same else None


def _values(model: nn.Module, channels: Channels) -> dict[str, Tensor]:
    products = channels.graph.product_weights()
    return {name: t for name, t in tensors_of_model(model).items() if name not in products}
