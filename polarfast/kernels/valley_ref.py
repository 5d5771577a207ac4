"""Valley thresholds in plain torch: the readable statement of the rule (Sec. 3.3 of the paper).

Bins are those of numpy.histogram(γ as float32, bins=100, range=(0, 1)), whose edges are float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 100


def edges_ref(device: torch.device | None = None) -> Tensor:
    """The 101 edges of numpy's float32 bins, as float32."""
    return (torch.arange(BINS + 1, dtype=torch.float64, device=device) * 0.01).float()


def histogram_ref(gamma: Tensor) -> Tensor:
    """Counts of one layer, int64 [100]: edge[i] <= γ < edge[i+1]; 1 is in the last bin."""
    x = gamma.detach().float().flatten()
    x = x[(x >= 0) & (x <= 1)]  # drops NaN as well
    bins = torch.bucketize(x, edges_ref(x.device), right=True) - 1
    return torch.bincount(bins.clamp(max=BINS - 1), minlength=BINS)


def first_valley_ref(counts: Tensor) -> float:
    """Left edge of bin i+1, first i with d[i] <= 0 <= d[i+1], d = diff(counts); NaN: none."""
    d = counts.diff()
    found = ((d[:-1] <= 0) & (d[1:] >= 0)).nonzero()
    return edges_ref()[int(found[0]) + 1].item() if len(found) else float("nan")


def valley_ref(gammas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Summary, float64 [L, 3] (threshold, kept, non-finite), and counts, int64 [L, 100]."""
    counts = [histogram_ref(gamma) for gamma in gammas]
    rows = []
    for gamma, row in zip(gammas, counts, strict=True):
        threshold = first_valley_ref(row)
        none = threshold != threshold
        kept = gamma.numel() if none else int((gamma.double() > threshold).sum())
        rows.append([threshold, kept, int((~gamma.isfinite()).sum())])
    device = gammas[0].device
    return torch.tensor(rows, dtype=torch.float64, device=device), torch.stack(counts)
