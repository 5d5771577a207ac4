"""What a run tells those who watch it: displays, logs, TensorBoard."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BINS = 100


@dataclass(frozen=True)
class Gammas:
    """Where the scaling factors stand after an epoch.

    Attributes:
        values: all γ, flat, float32, on the CPU.
        cut: share of the MACs that pruning now would cut.
    """

    values: Tensor
    cut: float

    @property
    def histogram(self) -> Tensor:
        """Counts in 100 bins over [0, 1]."""
        return torch.histc(self.values, BINS, 0.0, 1.0).int()

    @property
    def at_zero(self) -> float:
        """Share of the γ below 0.01."""
        return float((self.values.abs() < 1 / BINS).float().mean())


@dataclass(frozen=True)
class Epoch:
    """One finished epoch.

    Attributes:
        stage: "sparsity training" or "fine-tuning".
        epoch: number within the stage, from 1; epochs: of the stage; index: number within the run.
        loss: mean training loss; accuracy: on the test images, percent; seconds: wall time.
        gammas: only while γ are trained.
    """

    stage: str
    epoch: int
    epochs: int
    index: int
    loss: float
    accuracy: float
    lr: float
    seconds: float
    gammas: Gammas | None = None

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a log, without the tensors."""
        names = ("stage", "epoch", "index", "loss", "accuracy", "lr", "seconds")
        values = {name: getattr(self, name) for name in names}
        if self.gammas is not None:
            values |= {"cut": self.gammas.cut, "at_zero": self.gammas.at_zero}
        return values


class Observer(Protocol):
    """Watches a run. Calls come in order, from one process, outside of any measured time."""

    def stage_started(self, stage: str, done: int, epochs: int) -> None:
        """A stage begins, or goes on after ``done`` epochs."""

    def epoch_finished(self, epoch: Epoch) -> None:
        """An epoch is done and its checkpoint written."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def close(self) -> None:
        """The run ended, well or not."""
