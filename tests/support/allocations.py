"""Counts the memory of tensors: a mode that adds up the storages that operators make."""

import weakref

from torch.utils._python_dispatch import TorchDispatchMode

from polarfast.inputs import tensors_in
from polarfast.running import tensors_of


class Allocations(TorchDispatchMode):
    """Bytes of the storages that were made inside and still live.

    Attributes:
        peak: the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs or {}))}
        for tensor in tensors_of(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size and key not in given and key not in self._live:
                self._live[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)
