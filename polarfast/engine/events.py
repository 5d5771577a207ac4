"""What a run tells those who watch it: displays, logs, TensorBoard."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BINS = 100


@dataclass(frozen=True)
class Gammas:
    """Where the scaling factors stand.

    Attributes:
        values: name of the scaling factor -> its γ, float32 [C], on the CPU.
        cut: share of the MACs that pruning now would cut.
        lam: the regularizer's λ at this moment; t: its t.
    """

    values: dict[str, Tensor]
    cut: float
    lam: float
    t: float

    @property
    def histogram(self) -> Tensor:
        """Counts of all |γ| in 100 bins over [0, 1], int32 [100]; what is over 1 is in the last."""
        return self.histograms.sum(0, dtype=torch.int32)

    @property
    def histograms(self) -> Tensor:
        """:attr:`histogram` of each layer, int32 [L, 100], in the order of ``values``."""
        rows = [torch.histc(g.abs().clamp(max=1.0), BINS, 0.0, 1.0) for g in self.values.values()]
        return torch.stack(rows).int() if rows else torch.zeros((0, BINS), dtype=torch.int32)

    @property
    def at_zero(self) -> float:
        """Share of the γ below 0.01."""
        every = sum(gamma.numel() for gamma in self.values.values())
        zeros = sum(int((gamma.abs() < 1 / BINS).sum()) for gamma in self.values.values())
        return zeros / max(every, 1)


@dataclass(frozen=True)
class Step:
    """How far a stage is, in the middle of an epoch.

    Attributes:
        stage: "sparsity training", "fine-tuning", or "training" of a plain network.
        step: optimizer steps done in the stage; steps: of the whole stage.
        epoch: number of the epoch that is going on, from 1; epochs: of the stage.
        loss: a recent training loss; lr: the learning rate.
        images_per_second: over all processes.
        cut, at_zero: as in :class:`Gammas`; None while no γ are trained.
    """

    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    lr: float
    images_per_second: float
    cut: float | None
    at_zero: float | None


@dataclass(frozen=True)
class Epoch:
    """One finished epoch.

    Attributes:
        stage: as in :class:`Step`.
        epoch: number within the stage, from 1; epochs: of the stage; index: number within the run.
        loss: mean training loss; accuracy: on the test images, percent.
        lr: learning rate of the last step; seconds: wall time of the epoch.
        images_per_second: trained on, over all processes.
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
    images_per_second: float
    gammas: Gammas | None = None

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a log, without the tensors."""
        names = ("stage", "epoch", "epochs", "index", "loss", "accuracy", "lr", "seconds")
        values = {name: getattr(self, name) for name in (*names, "images_per_second")}
        if (gammas := self.gammas) is not None:
            values |= {
                "cut": gammas.cut,
                "at_zero": gammas.at_zero,
                "lam": gammas.lam,
                "t": gammas.t,
            }
        return values


class Observer(Protocol):
    """Watches a run. Calls come in order, from one process, outside of any measured time."""

    def stage_started(self, stage: str, done: int, steps: int, epochs: int) -> None:
        """A stage begins, or goes on after ``done`` of its ``steps`` optimizer steps."""

    def step_finished(self, step: Step) -> None:
        """Some steps are done; called a few times a second at most."""

    def epoch_finished(self, epoch: Epoch) -> None:
        """An epoch is done and its checkpoint written."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def close(self) -> None:
        """The run ended, well or not."""
