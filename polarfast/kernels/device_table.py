"""The pointer table as the Triton kernels read it: tensors on the γ's own device."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BuildError


class DeviceTable:
    """Addresses, sizes and weights of L γ tensors, n factors in all.

    Attributes:
        addresses: int64 [3, L]: of γ, its gradient, its momentum buffer; 0: none.
        sizes, starts: int64 [L]: numbers of γ, and their exclusive prefix sum.
        weights: float64 [L].
        row_of: int32 [n]: the row of each γ.
        scratch: float64 [4, L], for sums that one launch leaves to the next.
    """

    addresses: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.numel = sum(sizes)
        self.max_size = max(sizes)
        host_sizes = torch.tensor(sizes, dtype=torch.int64)
        rows = torch.arange(len(sizes), dtype=torch.int32)
        self.sizes = self._copied(host_sizes)
        self.starts = self._copied(host_sizes.cumsum(0) - host_sizes)
        self.weights = self._copied(torch.tensor(weights, dtype=torch.float64))
        self.row_of = self._copied(rows.repeat_interleave(host_sizes))
        self.scratch = torch.zeros((4, len(sizes)), dtype=torch.float64, device=device)
        self._captured: dict[int, tuple[Tensor, Tensor]] = {}

    def set_addresses(self, addresses: list[list[int]]) -> None:
        """Copies new addresses to the device, without waiting for it."""
        self._host_addresses = torch.tensor(addresses, dtype=torch.int64)
        if self.device.type == "cuda":
            self._host_addresses = self._host_addresses.pin_memory()
        self.addresses = self._host_addresses.to(self.device, non_blocking=True)

    def hold_if_captured(self) -> None:
        """Keeps what a CUDA graph that is being captured will read when it is replayed.

        Its kernels read the `addresses` of now, filled by the copy above if that is in the graph
        too. Later addresses go to new memory; the old memory must stay.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            held = (self._host_addresses, self.addresses)
            self._captured[self.addresses.data_ptr()] = held

    def _copied(self, host: Tensor) -> Tensor:
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)


def triton_launchers() -> tuple[ModuleType, ModuleType]:
    """The modules polarize_triton and valley_triton, imported only now: Triton is optional.

    Raises:
        BuildError: Triton is not installed.
    """
    try:
        from . import polarize_triton, valley_triton
    except ImportError as error:
        raise BuildError(
            "Scaling factors on a GPU need Triton, which cannot be imported "
            f"({error}); install it with `pip install triton`"
        ) from error
    return polarize_triton, valley_triton
