"""Many index lists of different lengths, looked up at once."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Ragged:
    """Index lists into a table of classes, kept end to end.

    Attributes:
        flat: int64, all lists one after the other.
        sizes: length of each.
    """

    def __init__(self, lists: Sequence[Tensor]) -> None:
        self.sizes = [part.numel() for part in lists]
        none = torch.zeros(0, dtype=torch.long, device="cpu")
        self.flat = torch.cat([none, *(part.flatten() for part in lists)])

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor([0, *self.sizes], device="cpu").cumsum(0)

    @cached_property
    def rows(self) -> Tensor:
        """int64, the list that each entry of `flat` belongs to."""
        rows = torch.arange(len(self.sizes), device="cpu")
        return rows.repeat_interleave(torch.tensor(self.sizes, dtype=torch.long, device="cpu"))

    def counts(self, mask: Tensor) -> Tensor:
        """int64 [number of lists]: entries of each whose class is in `mask` (bool by class)."""
        sums = torch.zeros(self.flat.numel() + 1, dtype=torch.long, device="cpu")
        torch.cumsum(mask.index_select(0, self.flat), 0, out=sums[1:])
        return sums[self._ends].diff()

    def of(self, lists: Tensor) -> Tensor:
        """All entries of the lists chosen (bool [number of lists])."""
        return self.flat[lists[self.rows]]
