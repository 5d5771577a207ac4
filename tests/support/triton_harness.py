"""Tables for the tests of the Triton kernels; the oracles are every backend's (oracles.py).

The kernels run on the GPU where there is one, else in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polarfast.kernels.device_table import DeviceTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def table_of(
    gammas: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
) -> DeviceTable:
    """A row whose gradient is None is frozen. Without `momenta` that part of the table is stale."""
    owners: list[list[Tensor | None]] = [list(gammas), list(grads), list(momenta or gammas)]
    sizes = [g.numel() for g in gammas]
    addresses = [[0 if x is None else x.data_ptr() for x in owner] for owner in owners]
    table = DeviceTable(sizes, weights or [1.0] * len(gammas), gammas[0].dtype, DEVICE)
    table.set_addresses(addresses)
    table.owners = owners  # type: ignore[attr-defined]  # keeps alive what the addresses point to
    return table


def random_rows(sizes: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Factors in [-0.2, 1], some of them exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.rand(n, generator=generator, dtype=torch.float64) * 1.2 - 0.2 for n in sizes]
    return [torch.where(r.abs() < 0.02, 0.0, r).to(dtype).to(DEVICE) for r in rows]
