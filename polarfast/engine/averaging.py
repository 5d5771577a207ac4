"""Averaged weights: an exponential moving average of a model's parameters and statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The moving average of all floating-point parameters and buffers of a model.

    Unlike ``torch.optim.swa_utils.AveragedModel`` it copies no module, which FSDP2 does not allow.

    Args:
        model: whose tensors are followed; they may be DTensors.
        decay: weight of the past in each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._update = get_ema_multi_avg_fn(decay)
        self.tensors = [tensor.detach().clone() for tensor in self._current()]

    def buffers(self) -> list[Tensor]:
        """The averages of the buffers."""
        count = sum(buffer.is_floating_point() for buffer in self._model.buffers())
        return self.tensors[len(self.tensors) - count :]

    def take(self) -> None:
        """Make the model's present values the averages."""
        _copy(self.tensors, self._current())

    def _current(self) -> list[Tensor]:
        every = [*self._model.parameters(), *self._model.buffers()]
        return [_local(tensor) for tensor in every if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is now."""
        self._update(self.tensors, self._current(), 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the averages inside the block, and its own values again after it."""
        current = self._current()
        own = [tensor.detach().clone() for tensor in current]
        _copy(current, self.tensors)
        try:
            yield
        finally:
            _copy(current, own)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
