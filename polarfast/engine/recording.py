"""Observers that write: TensorBoard event files and a JSONL log."""

import json
from pathlib import Path

from polarfast.engine.events import Epoch


class TensorBoardLog:
    """Scalars of every epoch and the histogram of all γ, as TensorBoard event files.

    Args:
        folder: of the event files.
        done: epochs that are already logged; later ones, from before an interruption, are hidden.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def stage_started(self, stage: str, done: int, epochs: int) -> None:
        pass

    def epoch_finished(self, epoch: Epoch) -> None:
        scalars = {
            "loss/train": epoch.loss,
            "accuracy/test": epoch.accuracy,
            "learning_rate": epoch.lr,
        }
        if (gammas := epoch.gammas) is not None:
            scalars["pruning/macs_cut"] = gammas.cut
            scalars["pruning/gamma_at_zero"] = gammas.at_zero
            self._writer.add_histogram("gamma", gammas.values, epoch.index, bins=100)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch.index)

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class JsonLog:
    """One line of JSON an epoch.

    Args:
        path: of the log; written anew.
        history: the lines of the epochs before an interruption.
    """

    def __init__(self, path: Path, history: list[dict[str, object]]) -> None:
        self._file = path.open("w", encoding="utf-8")
        for values in history:
            self._write(values)

    def stage_started(self, stage: str, done: int, epochs: int) -> None:
        pass

    def epoch_finished(self, epoch: Epoch) -> None:
        self._write(epoch.to_dict())

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict[str, object]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
