"""The table on the CPU: the addresses of all γ, and the C++ ops on them.

Handing three lists of 53 tensors to an op costs more than the arithmetic on them. The table keeps
the addresses, and reads and checks them again at each step (csrc/table.cpp). The Triton kernels
work from the same addresses (triton_table.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import ScalingFactorError
from . import ScaleRows
from .table import BINS, Penalty, SgdStep, Table


class ScaleTable(Table):
    """As `Table`; between `refresh` and what follows it, gradients and momentum buffers stay where
    they are in memory, and for `sgd_step_` and `add_subgradient_` the γ do.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        tilts: Sequence[float] | None = None,
    ) -> None:
        super().__init__(names, params, weights, tilts)
        self._rows = ScaleRows(self.params, self._row_weights, self._tilts)
        self.refresh()

    def refresh(self, momentum_of: dict[Any, Any] | None = None) -> int:
        found = self._rows.refresh(momentum_of)
        if found < 0:
            raise self._refusal(-1 - found, momentum_of)
        return found

    def buffered(self) -> int:
        return self._rows.buffered()

    def add_subgradient_(self, penalty: Penalty, grad_scale: Tensor | None = None) -> None:
        self._rows.add_subgradient_(penalty, _value(grad_scale, 1.0))
        increment_version(self._rows.grads())

    def clamp_(self, upper: float, found_inf: Tensor | None = None) -> None:
        self._follow()
        if _value(found_inf, 0.0) == 0:
            self._rows.clamp_(upper)
        increment_version(self._rows.moving())

    def sgd_step_(
        self,
        penalty: Penalty,
        sgd: SgdStep,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        self._check_momentum(sgd)
        if _value(found_inf, 0.0) == 0:
            self._rows.sgd_step_(penalty, sgd, _value(grad_scale, 1.0))
        increment_version(self._rows.moving())

    def _use_centers(self, centers: Sequence[float]) -> None:
        self._rows.set_centers(centers)

    def valley(self) -> tuple[Tensor, Tensor]:
        usable, summary, counts = self._rows.valley()
        if usable < len(self.params):
            raise self._refusal(usable, None)
        return (
            torch.frombuffer(summary, dtype=torch.float64).view(-1, 3),
            torch.frombuffer(counts, dtype=torch.int64).view(-1, BINS),
        )

    def _gammas(self) -> list[int]:
        """The addresses of all γ, apart from those that a step has read."""
        found = self._rows.gammas()
        if len(found) < len(self.params):
            raise self._refusal(len(found), None)
        return found

    def _follow(self) -> None:
        """Reads the addresses of the γ again: some optimizers, and hooks, assign to param.data."""
        found = self._rows.follow()
        if found < 0:
            raise self._refusal(-1 - found, None)

    def _check_momentum(self, sgd: SgdStep) -> None:
        if sgd.momentum != 0 and (row := self._rows.without_momentum()) >= 0:
            raise self._no_momentum(row)

    def _refusal(self, row: int, momentum_of: dict[Any, Any] | None) -> ScalingFactorError:
        """What the C++ side cannot use, in words."""
        return ScalingFactorError(
            self._unusable(row, momentum_of)
            or f"{self.names[row]}, its gradient or its momentum buffer has no memory"
        )


def _value(scalar: Tensor | None, otherwise: float) -> float:
    return otherwise if scalar is None else scalar.item()
