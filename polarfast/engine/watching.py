"""What a run tells those who watch it: a live display or log lines, JSON lines, TensorBoard."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..documents import sealed
from .histograms import BINS, Gammas

LEVELS = " ▁▂▃▄▅▆▇█"
LOG_EVERY_SECONDS = 5.0
LOG_STEPS_EVERY_SECONDS = 60.0


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
        computed: share of the dense network's MACs that an image took.
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
    computed: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a log, without the tensors."""
        names = ("stage", "epoch", "epochs", "index", "loss", "accuracy", "lr", "seconds")
        values = {name: getattr(self, name) for name in (*names, "images_per_second")}
        values["computed"] = self.computed
        if (gammas := self.gammas) is not None:
            values |= {
                "cut": gammas.cut,
                "at_zero": gammas.at_zero,
                "lam": gammas.lam,
                "t": gammas.t,
            }
        return values


class Observer:
    """Watches a run; this one does nothing. Calls come in order, from one process, outside of any
    measured time.
    """

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


def sparkline(histogram: Tensor, width: int = 25) -> str:
    """A histogram as one line of block characters.

    Heights go with the square root of the counts, so that the peak at 0 does not hide the rest;
    a cell that is not empty is never blank.
    """
    cells = histogram.reshape(width, -1).sum(1).double().sqrt()
    top = float(cells.max()) or 1.0
    last = len(LEVELS) - 1
    return "".join(LEVELS[max(1, round(float(c) / top * last)) if c > 0 else 0] for c in cells)


def make_display(console: Console) -> Observer:
    """The live display for a terminal, log lines for a file or pipe."""
    return LiveDisplay(console) if console.is_terminal else LogDisplay(console)


def log_line(epoch: Epoch) -> str:
    """All figures of an epoch on one line."""
    width = len(str(epoch.epochs))
    line = (
        f"{epoch.stage} {epoch.epoch:>{width}}/{epoch.epochs}  loss {epoch.loss:.4f}  "
        f"accuracy {epoch.accuracy:5.2f} %"
    )
    if (gammas := epoch.gammas) is not None:
        line += (
            f"  MACs cut if pruned now {100 * gammas.cut:4.1f} %  "
            f"γ 0|{sparkline(gammas.histogram)}|1  {100 * gammas.at_zero:.0f} % at 0"
            f"  λ {gammas.lam:.3g}  t {gammas.t:.3g}"
        )
    return f"{line}  lr {epoch.lr:.3g}  {_speed(epoch.images_per_second)}  {epoch.seconds:.1f} s"


def step_line(step: Step) -> str:
    """All figures of a moment within an epoch on one line."""
    share = 100 * step.step / max(step.steps, 1)
    line = (
        f"{step.stage} {share:.1f} %, epoch {step.epoch}/{step.epochs}, step {step.step:,} of "
        f"{step.steps:,}  loss {step.loss:.4f}"
    )
    if step.cut is not None:
        line += f"  MACs cut if pruned now {100 * step.cut:4.1f} %"
    if step.at_zero is not None:
        line += f"  {100 * step.at_zero:.0f} % of γ at 0"
    return f"{line}  lr {step.lr:.3g}  {_speed(step.images_per_second)}"


class LogDisplay(Observer):
    """Plain lines: notes, and an epoch every few seconds, the first and the last always.

    Epochs that take minutes get a line every minute.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last_epoch = self._last_line = -LOG_EVERY_SECONDS

    def stage_started(self, stage: str, done: int, steps: int, epochs: int) -> None:
        self._last_line = time.monotonic()
        self._last_epoch = self._last_line - LOG_EVERY_SECONDS

    def step_finished(self, step: Step) -> None:
        if time.monotonic() - self._last_line >= LOG_STEPS_EVERY_SECONDS:
            self._print(step_line(step))

    def epoch_finished(self, epoch: Epoch) -> None:
        now = time.monotonic()
        if now - self._last_epoch >= LOG_EVERY_SECONDS or epoch.epoch == epoch.epochs:
            self._last_epoch = now
            self._print(log_line(epoch))

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveDisplay(Observer):
    """A bar with the time left of the stage and, under it, the figures of the last step and epoch.

    The bar counts optimizer steps, so that it moves and knows the time left within an epoch too.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._now: Step | Epoch | None = None
        self._epoch: Epoch | None = None
        self._live = Live(self._render(), console=console, refresh_per_second=4)
        self._live.start()

    def stage_started(self, stage: str, done: int, steps: int, epochs: int) -> None:
        self._drop_task()
        # Counting from 1: the epoch that goes on, not those that are done.
        epoch = min(epochs, done * epochs // max(steps, 1) + 1)
        self._task = self.progress.add_task(
            stage.capitalize(), completed=done, total=steps, epoch=epoch, epochs=epochs
        )
        self._now = self._epoch = None
        self._live.update(self._render())

    def step_finished(self, step: Step) -> None:
        self._now = step
        if self._task is not None:
            self.progress.update(self._task, completed=step.step, epoch=step.epoch)
        self._live.update(self._render())

    def epoch_finished(self, epoch: Epoch) -> None:
        self._now = self._epoch = epoch
        if self._task is not None:
            steps = self.progress.tasks[0].total or 0
            done = steps * epoch.epoch / epoch.epochs
            self.progress.update(self._task, completed=done, epoch=epoch.epoch)
        self._live.update(self._render())

    def note(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._drop_task()
        self._now = self._epoch = None
        self._live.update(Text(""), refresh=True)
        self._live.stop()

    def _drop_task(self) -> None:
        if self._task is not None:
            self.progress.remove_task(self._task)
            self._task = None

    def _render(self) -> Group:
        if self._now is None:
            return Group(self.progress)
        return Group(self.progress, _figures(self._now, self._epoch))


def _figures(now: Step | Epoch, epoch: Epoch | None) -> Table:
    """The latest numbers, and those that only a finished epoch has."""
    gammas = epoch.gammas if epoch is not None else None
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", justify="right")
    table.add_column(min_width=30)
    table.add_column(style="dim", justify="right")
    table.add_column(min_width=10)
    accuracy = "—"
    if epoch is not None:
        accuracy = f"[bold]{epoch.accuracy:.2f} %[/] (epoch {epoch.epoch})"
    table.add_row("loss", f"{now.loss:.4f}", "test accuracy", accuracy)
    table.add_row("speed", _speed(now.images_per_second), "learning rate", f"{now.lr:.3g}")
    cut, at_zero = (now.cut, now.at_zero) if isinstance(now, Step) else (None, None)
    if gammas is not None:
        cut = gammas.cut if cut is None else cut
        at_zero = gammas.at_zero if at_zero is None else at_zero
        table.add_row("λ", f"{gammas.lam:.3g}", "t", f"{gammas.t:.3g}")
    if cut is not None and at_zero is not None:
        spark = "" if gammas is None else f"0│[cyan]{sparkline(gammas.histogram)}[/]│1"
        table.add_row("γ", spark, "at 0", f"{100 * at_zero:.0f} %")
        table.add_row("", "", "MACs cut if pruned now", f"[bold]{100 * cut:.1f} %[/]")
    return table


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:,.0f} img/s"


class TensorBoardLog(Observer):
    """Scalars of every epoch and histograms of γ, as TensorBoard event files.

    The step of every event is the number of the epoch within the run.

    Args:
        folder: of the event files.
        done: epochs that are already logged; later ones, from before an interruption, are hidden.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

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

    def close(self) -> None:
        self._writer.close()

    def _histograms(self, gammas: Gammas, index: int) -> None:
        self._writer.add_histogram(
            "gamma", torch.cat(list(gammas.values.values())), index, bins=BINS
        )
        for name, values in gammas.values.items():
            self._writer.add_histogram(f"gamma_of/{name}", values, index, bins=BINS)


class JsonLog(Observer):
    """One line of JSON an epoch; a number that is not finite becomes null.

    Args:
        path: of the log; written anew.
        history: the lines of the epochs before an interruption.
    """

    def __init__(self, path: Path, history: list[dict[str, Any]]) -> None:
        self._file = path.open("w", encoding="utf-8")
        for values in history:
            self._write(values)

    def epoch_finished(self, epoch: Epoch) -> None:
        self._write(epoch.to_dict())

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        # JSON has no NaN; other readers than Python's refuse it.
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(sealed(clean), allow_nan=False) + "\n")
        self._file.flush()
