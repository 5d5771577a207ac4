"""Tables and float64 oracles for the tests of the Triton kernels.

The kernels run on the GPU where there is one, else in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POLARIZATION, L1, DEEPHOYER = 0, 1, 2
KINDS = [
    (POLARIZATION, False),
    (POLARIZATION, True),
    (L1, False),
    (DEEPHOYER, False),
]  # (kind, per_layer)


@dataclass
class Rows:
    """A table of addresses built straight from lists of tensors: all that a launcher reads."""

    addresses: Tensor
    sizes: Tensor
    starts: Tensor
    weights: Tensor
    row_of: Tensor
    scratch: Tensor
    dtype: torch.dtype
    device: torch.device
    numel: int
    owners: list[list[Tensor | None]]  # keeps alive what the addresses point to


def table_of(
    gammas: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
) -> Rows:
    """A row whose gradient is None is frozen. Without `momenta` that part of the table is stale."""
    owners: list[list[Tensor | None]] = [list(gammas), list(grads), list(momenta or gammas)]
    sizes = torch.tensor([g.numel() for g in gammas])
    addresses = [[0 if x is None else x.data_ptr() for x in owner] for owner in owners]
    return Rows(
        addresses=torch.tensor(addresses).to(DEVICE),
        sizes=sizes.to(DEVICE),
        starts=(sizes.cumsum(0) - sizes).to(DEVICE),
        weights=torch.tensor(weights or [1.0] * len(gammas), dtype=torch.float64).to(DEVICE),
        row_of=torch.repeat_interleave(torch.arange(len(gammas)), sizes).int().to(DEVICE),
        scratch=torch.full((4, len(gammas)), float("nan"), dtype=torch.float64, device=DEVICE),
        dtype=gammas[0].dtype,
        device=DEVICE,
        numel=int(sizes.sum()),
        owners=owners,
    )


def random_rows(sizes: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Factors in [-0.2, 1], some of them exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.rand(n, generator=generator, dtype=torch.float64) * 1.2 - 0.2 for n in sizes]
    return [torch.where(r.abs() < 0.02, 0.0, r).to(dtype).to(DEVICE) for r in rows]


def penalty(
    gammas: Sequence[Tensor], weights: Sequence[float], kind: int, t: float, per_layer: bool
) -> Tensor:
    """R(γ; w) as the paper prints it (Eq. 2), or the rival's penalty."""
    if kind == L1:
        terms = [w * g.abs().sum() for g, w in zip(gammas, weights, strict=True)]
    elif kind == DEEPHOYER:
        terms = [
            w * g.abs().sum() ** 2 / (g**2).sum() for g, w in zip(gammas, weights, strict=True)
        ]
    else:
        mean = torch.cat(list(gammas)).mean()
        terms = [
            w * (t * g.abs() - (g - (g.mean() if per_layer else mean)).abs()).sum()
            for g, w in zip(gammas, weights, strict=True)
        ]
    return torch.stack(terms).sum()


def subgradient(
    gammas: Sequence[Tensor], weights: Sequence[float], kind: int, t: float, per_layer: bool
) -> list[Tensor]:
    """∂R by autograd in float64."""
    leaves = [g.detach().double().cpu().requires_grad_() for g in gammas]
    return list(torch.autograd.grad(penalty(leaves, weights, kind, t, per_layer), leaves))
