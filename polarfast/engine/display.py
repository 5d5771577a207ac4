"""What a person watches while a run goes on: a live display in a terminal, log lines elsewhere."""

import time

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

from polarfast.engine.events import Epoch, Observer, Step

LEVELS = " ▁▂▃▄▅▆▇█"
LOG_EVERY_SECONDS = 5.0
LOG_STEPS_EVERY_SECONDS = 60.0


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


class LogDisplay:
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

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveDisplay:
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
