"""A trace that a plan keeps, so that `slim` need not trace the same network again: `Traced`."""

import weakref
from typing import Any

from torch import nn

from .classes import Channels


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
