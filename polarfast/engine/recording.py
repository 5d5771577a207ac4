"""Observers that write: TensorBoard event files and a JSONL log."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from polarfast.engine.events import Epoch, Gammas, Step


class TensorBoardLog:
    """Scalars of every epoch and histograms of γ, as TensorBoard event files.

    The step of every event is the number of the epoch within the run.

    Args:
        folder: of the event files.
        done: epochs that are already logged; later ones, from before an interruption, are hidden.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def stage_started(self, stage: str, done: int, steps: int, epochs: int) -> None:
        pass

    def step_finished(self, step: Step) -> None:
        pass

    def epoch_finished(self, epoch: Epoch) -> None:
        scalars = {
            "loss/train": epoch.loss,
            "accuracy/test": epoch.accuracy,
            "learning_rate": epoch.lr,
            "images_per_second": epoch.images_per_second,
        }
        if (gammas := epoch.gammas) is not None:
            scalars["pruning/macs_cut"] = gammas.cut
            scalars["pruning/gamma_at_zero"] = gammas.at_zero
            scalars["pruning/lam"] = gammas.lam
            scalars["pruning/t"] = gammas.t
            self._histograms(gammas, epoch.index)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch.index)
        self._writer.flush()

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._writer.close()

    def _histograms(self, gammas: Gammas, index: int) -> None:
        self._writer.add_histogram(
            "gamma", torch.cat(list(gammas.values.values())), index, bins=100
        )
        for name, values in gammas.values.items():
            self._writer.add_histogram(f"gamma_of/{name}", values, index, bins=100)


class JsonLog:
    """One line of JSON an epoch; a number that is not finite becomes null.

    Args:
        path: of the log; written anew.
        history: the lines of the epochs before an interruption.
    """

    def __init__(self, path: Path, history: list[dict[str, Any]]) -> None:
        self._file = path.open("w", encoding="utf-8")
        for values in history:
            self._write(values)

    def stage_started(self, stage: str, done: int, steps: int, epochs: int) -> None:
        pass

    def step_finished(self, step: Step) -> None:
        pass

    def epoch_finished(self, epoch: Epoch) -> None:
        self._write(epoch.to_dict())

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        # JSON has no NaN; other readers than Python's refuse it.
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
