"""Valley thresholds of all layers in one call, as a dispatcher op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import register
from .valley_ref import BINS, valley_ref


def valley(gammas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The paper's threshold of each layer (Sec. 3.3) and the histogram it comes from.

    Args:
        gammas: L tensors of γ, of one floating dtype on one device, contiguous.

    Returns:
        summary: float64 [L, 3]: threshold (NaN: there is no valley), number of γ above it (all if
            there is none), number of NaN and infinite γ.
        counts: int64 [L, 100]: numpy.histogram(γ as float32, bins=100, range=(0, 1)).
    """
    return torch.ops.polarfast.valley(gammas)


def _shapes(gammas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    summary = gammas[0].new_empty((len(gammas), 3), dtype=torch.float64)
    return summary, gammas[0].new_empty((len(gammas), BINS), dtype=torch.int64)


register("valley", fake=_shapes, elsewhere=valley_ref)
