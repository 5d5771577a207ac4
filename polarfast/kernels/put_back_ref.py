"""Put-back in plain torch."""

import torch
from torch import Tensor


def put_back_ref(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """constant[c] everywhere, but for the channels `index`, which are those of `kept`."""
    shape = (kept.shape[0], constant.numel(), *kept.shape[2:])
    full = constant.to(kept.dtype).view(1, -1, *[1] * (kept.dim() - 2)).expand(shape)
    if (
        kept.dim() == 4
        and kept.is_contiguous(memory_format=torch.channels_last)
        and not kept.is_contiguous()
    ):
        full = full.contiguous(memory_format=torch.channels_last)
    return torch.index_copy(full, 1, index, kept)


def put_back_by_reading(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """The same, said from the output's side: where does this element come from?

    A compiler can make it one loop with the normalization before and the addition behind; a write
    to computed places (`index_copy`) ends a loop.
    """
    width = constant.numel()
    order = torch.arange(index.numel(), device=index.device)
    source = torch.zeros(width, dtype=torch.long, device=index.device).index_copy(0, index, order)
    stays = torch.zeros(width, dtype=torch.bool, device=index.device).index_fill(0, index, True)
    ones = [1] * (kept.dim() - 2)
    other = constant.to(kept.dtype).view(1, width, *ones)
    return torch.where(stays.view(1, width, *ones), kept.index_select(1, source), other)
