"""What the suite asks to know of a network."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .pruners import MODES

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network of the suite.

    Attributes:
        name: as its library calls it, "timm/" before timm's.
        build: makes it, with random weights.
        exact: whether a pruner can keep every β exactly, with constant channels where a zero-padded
            convolution reads them: no depthwise convolutions, no squeeze-excite.
        shape: of one input, channels first in images.
        other: of one input of another size; None: the network takes one size alone.
        heads: leave the network itself in train mode, though none of its layers, for outputs that
            exist in that mode only.
        modes: in which there is anything to prune: where all channels meet in additions, "couple".
    """

    name: str
    build: Callable[[], nn.Module]
    exact: bool
    shape: tuple[int, ...] = (3, 64, 64)
    other: tuple[int, ...] | None = (3, 80, 96)
    heads: bool = False
    modes: tuple[str, ...] = MODES

    def inputs(self, batch: int = 2, seed: int = 3) -> Tensor:
        """Random inputs, float64 [batch, *shape]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *self.shape), dtype=torch.float64, generator=generator)


def of(package: str, module: str = "") -> Any:
    """A package's module; where the package is not installed, the test is skipped."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(f"{package}{module}")
