"""Many runs in one folder, several at a time: finished ones are not run again."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from ...errors import ArgumentError, PolarfastError
from ..folder import NAMES, Checkpoints, load_checkpoint
from ..interrupts import Interrupted, StopSignals
from ..launch import find_state, launch
from ..lock import locked
from ..recipe import Recipe
from ..run import DONE

POLL_SECONDS = 0.2
#: How long a trial may take to stop whose campaign was killed: a step and a checkpoint.
STOP_SECONDS = 120.0


@dataclass(frozen=True)
class Trial:
    """One run of a campaign.

    Attributes:
        name: of its folder. recipe: what to do.
        trained: name of an earlier trial of the same chain that did the same sparsity training,
            which is then not done again.
    """

    name: str
    recipe: Recipe
    trained: str | None = None


def run_all(
    chains: Sequence[Sequence[Trial]], folder: Path, jobs: int, note: Callable[[str], None]
) -> None:
    """Run every trial that is not finished yet.

    Args:
        chains: trials of one chain run one after another, chains side by side.
        folder: holds a folder for each trial; what a trial prints goes to its ``log.txt``.
        jobs: processes at a time.
        note: told of what begins and what ends.

    Raises:
        ArgumentError: ``jobs`` below 1, or started by torchrun; or another process works in
            ``folder``.
        Interrupted: a signal asked to stop; every trial has written its checkpoint.
        PolarfastError: a trial failed; the others that had begun are stopped as by a signal.
    """
    if jobs < 1:
        raise ArgumentError(f"jobs={jobs}: at least one run at a time")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError("many runs are started by one process, without torchrun: use jobs")
    waiting = [chain for chain in chains if not all(done(folder, trial) for trial in chain)]
    finished = sum(done(folder, trial) for chain in chains for trial in chain)
    note(f"{finished} of {sum(map(len, chains))} runs are finished")
    running: dict[BaseProcess, Sequence[Trial]] = {}
    context = multiprocessing.get_context("spawn")
    with locked(folder), StopSignals() as signals:
        try:
            while (waiting or running) and not signals.received:
                while waiting and len(running) < jobs:
                    chain = waiting.pop(0)
                    process: BaseProcess = context.Process(target=_run_chain, args=(chain, folder))
                    process.start()
                    running[process] = chain
                    note(f"begun: {', '.join(trial.name for trial in chain)}")
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if not process.is_alive()]:
                    chain = running.pop(process)
                    _check(process, chain, folder)
                    note(f"finished: {', '.join(trial.name for trial in chain)}")
        finally:
            for process in running:
                process.terminate()  # SIGTERM: a checkpoint is written
            for process in running:
                process.join()
    if signals.received:
        raise Interrupted(signals.received)


def done(folder: Path, trial: Trial) -> bool:
    """Whether a trial is finished, with just these settings.

    Raises:
        ArgumentError: its folder holds a run of other settings.
    """
    state = find_state(folder / trial.name, trial.recipe)
    written = (folder / trial.name / NAMES["results"]).is_file()
    return state is not None and state["phase"] == DONE and written


def _run_chain(chain: Sequence[Trial], folder: Path) -> None:
    """The work of one process."""
    # Trials side by side must not look for each other through torchrun's environment.
    os.environ.pop("RANK", None)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    for trial in chain:
        path = folder / trial.name
        # Trials of a campaign that was killed stop as by a signal, which takes its time.
        with locked(path, patience=STOP_SECONDS):
            finished = done(folder, trial)
        if finished:
            continue
        path.mkdir(parents=True, exist_ok=True)
        if trial.trained is not None:
            adopt_training(folder / trial.trained, path, trial.recipe)
        with (path / "log.txt").open("a", encoding="utf-8") as log:
            console = Console(file=log, width=100)
            try:
                launch(trial.recipe, path, console)
            except (PolarfastError, Interrupted) as stop:
                console.print(str(stop), markup=False, highlight=False, soft_wrap=True)
                raise SystemExit(1) from stop


def _stop_with_parent() -> None:
    """Waits until the campaign is gone: killed, it stops nobody itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)


def adopt_training(source: Path, target: Path, recipe: Recipe) -> None:
    """Give a run that has not begun the sparsity training of another one."""
    checkpoints = Checkpoints(target)
    if checkpoints.numbered():
        return
    state = load_checkpoint(source / NAMES["trained"])
    for name in ("dense", "gammas"):
        if (source / NAMES[name]).is_file():
            shutil.copyfile(source / NAMES[name], target / NAMES[name])
    checkpoints.save({**state, "recipe": recipe.to_dict()})


def _check(process: BaseProcess, chain: Sequence[Trial], folder: Path) -> None:
    if process.exitcode == 0:
        return
    unfinished = next((trial for trial in chain if not done(folder, trial)), chain[-1])
    log = folder / unfinished.name / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    last = lines[-1] if lines else f"its process ended with status {process.exitcode}"
    raise PolarfastError(f"run '{unfinished.name}' failed ({last}); see {log}")
