"""The compiled extension (csrc/module.cpp). The ops on tensors are under torch.ops.polarfast."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, str]: ...

class ScaleRows:
    def __init__(
        self, params: tuple[Tensor, ...], dtype: str, weights: Sequence[float]
    ) -> None: ...
    def refresh(self, momentum_of: dict[Any, Any] | None) -> int: ...
    def moving(self) -> list[Tensor]: ...
    def grads(self) -> list[Tensor]: ...
    def without_momentum(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def addresses(self) -> list[list[int]]: ...
    def add_subgradient_(
        self, kind: int, lam: float, t: float, per_layer: bool, grad_scale: float
    ) -> None: ...
    def clamp_(self, upper: float) -> None: ...
    def sgd_step_(
        self,
        kind: int,
        lam: float,
        t: float,
        per_layer: bool,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        upper: float | None,
        first_step: bool,
        grad_scale: float,
    ) -> None: ...
    def valley(self, summary: int, counts: int) -> None: ...
