"""What a person watches while a run goes on: a live display in a terminal, log lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from polarfast.engine.events import Epoch, Observer

LEVELS = " ▁▂▃▄▅▆▇█"
LOG_EVERY_SECONDS = 5.0


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
        )
    return f"{line}  {epoch.seconds:.1f} s"


class LogDisplay:
    """Plain lines: notes, and an epoch every few seconds, the first and the last always."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = -LOG_EVERY_SECONDS

    def stage_started(self, stage: str, done: int, epochs: int) -> None:
        self._last = -LOG_EVERY_SECONDS

    def epoch_finished(self, epoch: Epoch) -> None:
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_SECONDS or epoch.epoch == epoch.epochs:
            self._last = now
            self._print(log_line(epoch))

    def note(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveDisplay:
    """A bar with the time left and, under it, the figures of the last epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._last: Epoch | None = None
        self._live = Live(self._render(), console=console, refresh_per_second=4)
        self._live.start()

    def stage_started(self, stage: str, done: int, epochs: int) -> None:
        self._drop_task()
        self._task = self.progress.add_task(stage.capitalize(), completed=done, total=epochs)
        self._last = None
        self._live.update(self._render())

    def epoch_finished(self, epoch: Epoch) -> None:
        self._last = epoch
        if self._task is not None:
            self.progress.update(self._task, completed=epoch.epoch)
        self._live.update(self._render())

    def note(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._drop_task()
        self._last = None
        self._live.update(Text(""), refresh=True)
        self._live.stop()

    def _drop_task(self) -> None:
        if self._task is not None:
            self.progress.remove_task(self._task)
            self._task = None

    def _render(self) -> Group:
        if self._last is None:
            return Group(self.progress)
        return Group(self.progress, _figures(self._last))


def _figures(epoch: Epoch) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("loss", f"{epoch.loss:.4f}", "test accuracy", f"{epoch.accuracy:.2f} %")
    if (gammas := epoch.gammas) is not None:
        spark = f"0│[cyan]{sparkline(gammas.histogram)}[/]│1"
        table.add_row("γ", spark, "at 0", f"{100 * gammas.at_zero:.0f} %")
        table.add_row("", "", "MACs cut if pruned now", f"[bold]{100 * gammas.cut:.1f} %[/]")
    return table
