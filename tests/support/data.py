"""Data sets opened, and epochs of them read whole."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.settings import Data
from polarfast.engine.data.source import DataSource, load

CPU = torch.device("cpu")


def opened(name: str, root: Path, **fields: Any) -> DataSource:
    return load(Data(name, str(root), **fields), CPU)  # type: ignore[arg-type]


def epoch(source: DataSource, batch_size: int, seed: int = 0, **plan: int) -> tuple[Tensor, Tensor]:
    """All images and labels of an epoch, in order."""
    batches = list(source.train(EpochPlan(seed=seed, batch_size=batch_size, **plan)))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
