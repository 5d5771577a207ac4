"""Scaling factors: which γ take part in pruning, and their first values."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError

#: What may happen to channels that meet in an addition.
RESIDUAL_MODES = ("keep", "expand", "couple")


class ScalingFactors(Mapping[str, nn.Parameter]):
    """The scaling factors γ of a network, one tensor per layer, by name and in the order in which the layers run.

    Attributes:
        pinned: names of BatchNorm weights that cannot take part -> the reason.
        others: BatchNorm weights of the network that are not in this mapping (clamped too with ``clamp="all"``).
        residual: "keep", "expand" or "couple": what happens to channels that meet in an addition.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        pinned: Mapping[str, str] | None = None,
        others: Mapping[str, nn.Parameter] | None = None,
        residual: str = "keep",
    ) -> None:
        if residual not in RESIDUAL_MODES:
            raise ArgumentError(f"residual={residual!r}: choose one of {', '.join(map(repr, RESIDUAL_MODES))}")
        self._params = dict(params)
        self.pinned = dict(pinned or {})
        self.others = dict(others or {})
        self.residual = residual
        self._tables: dict[Any, Any] = {}  # address tables of these factors, kept by the training step

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def numel(self) -> int:
        """n: the number of scaling factors, that is of channels, over all layers."""
        return sum(param.numel() for param in self._params.values())

    def select(self, pattern: str) -> "ScalingFactors":
        """The factors whose name matches a regular expression (`re.search`), e.g. to regularize fewer than are pruned.

        Raises:
            ArgumentError: nothing matches, or the pattern is not a regular expression.
        """
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ArgumentError(f"pattern={pattern!r} is not a regular expression: {error}") from error
        chosen = {name: param for name, param in self._params.items() if regex.search(name)}
        if not chosen:
            known = ", ".join(list(self._params)[:4])
            raise ArgumentError(f"pattern={pattern!r} matches no scaling factor; names look like: {known}, …")
        rest = {name: param for name, param in self._params.items() if name not in chosen}
        return ScalingFactors(chosen, pinned=self.pinned, others={**rest, **self.others}, residual=self.residual)

    def __repr__(self) -> str:
        return (
            f"ScalingFactors({len(self)} layers, {self.numel()} channels, residual={self.residual!r}, "
            f"{len(self.pinned)} layers pinned)"
        )


def init_scales(scales: Mapping[str, nn.Parameter], value: float = 0.5) -> None:
    """Set every scaling factor to `value` in place (Sec. 3.2: all are initialized to 0.5).

    For networks trained from scratch: in a *trained* network this overwrites what the γ have learned; start such a network
    from gates, or train on from the γ it has.

    Raises:
        ArgumentError: `value` is not a finite number >= 0.
    """
    if not 0.0 <= value < float("inf"):
        raise ArgumentError(f"value={value!r}: scaling factors start from a finite number >= 0 (0.5 in the paper)")
    with torch.no_grad():
        for param in scales.values():
            param.fill_(value)
