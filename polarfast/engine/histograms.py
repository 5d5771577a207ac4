"""Where the scaling factors stand, as counts in equal bins: what is logged, drawn and reported."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 100  # over [0, 1]; for the thresholds' histogram the same
RIDGE_BINS = 50  # of figures
RIDGES = 16


@dataclass(frozen=True)
class Gammas:
    """Where the scaling factors stand.

    Attributes:
        values: name of the scaling factor -> its γ, float32 [C], on the CPU.
        cut: share of the MACs that pruning now would cut.
        lam: the regularizer's λ at this moment; t: its t.
    """

    values: dict[str, Tensor]
    cut: float
    lam: float
    t: float

    @property
    def histogram(self) -> Tensor:
        """Counts of all |γ| in 100 bins over [0, 1], int32 [100]; what is over 1 is in the last."""
        return self.histograms.sum(0, dtype=torch.int32)

    @property
    def histograms(self) -> Tensor:
        """:attr:`histogram` of each layer, int32 [L, 100], in the order of ``values``."""
        rows = [torch.histc(g.abs().clamp(max=1.0), BINS, 0.0, 1.0) for g in self.values.values()]
        return torch.stack(rows).int() if rows else torch.zeros((0, BINS), dtype=torch.int32)

    @property
    def at_zero(self) -> float:
        """Share of the γ below 0.01."""
        every = sum(gamma.numel() for gamma in self.values.values())
        zeros = sum(int((gamma.abs() < 1 / BINS).sum()) for gamma in self.values.values())
        return zeros / max(every, 1)


def ridges(counts: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """All γ at some epochs, closer together at the start, where γ part (Fig. 4).

    Args:
        counts: of all γ in 100 bins, one of each epoch.

    Returns:
        Numbers of R epochs, from 1; their counts, float64 [R, 50].
    """
    places = torch.linspace(0, 1, RIDGES, dtype=torch.float64) ** 1.7 * (len(counts) - 1)
    chosen = sorted({round(place) for place in places.tolist()})
    rows = torch.stack([counts[epoch].double() for epoch in chosen])
    return [epoch + 1 for epoch in chosen], rows.reshape(len(chosen), RIDGE_BINS, -1).sum(2)


def layer_name(name: str) -> str:
    """A scaling factor's name without the parameter's: the layer's."""
    return name.removesuffix(".weight")
