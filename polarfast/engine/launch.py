"""A run from the command line: what is shown and logged, where it goes on, and its table."""

import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..documents import sealed
from ..errors import ArgumentError, FileFormatError
from ..planning.costs import NAMES
from ..profiling import device_name, median_latencies
from . import figures
from .distributed import Workers
from .folder import Checkpoints, write_text
from .interrupts import Interrupted
from .lock import locked
from .recipe import PHASES, Recipe, differing_settings, recipe_from_dict, to_yaml
from .results import BATCHES, Pair, Results, results_table
from .run import DONE, Run
from .watching import JsonLog, Observer, TensorBoardLog, make_display
from .yamls import sealed_yaml

LATENCY_SECONDS = 0.5  # for each batch size


def launch(
    recipe: Recipe,
    folder: Path,
    console: Console,
    phases: tuple[str, ...] = PHASES,
    resume: bool = False,
    again: bool = False,
) -> Results | None:
    """Run a recipe in ``folder``, or go on where it was interrupted, and print its table.

    Args:
        phases: those to do; the ones before them must be done.
        resume: fail if there is nothing to go on from.
        again: start anew where the run in ``folder`` is finished.

    Returns:
        The figures, on the first process, if the run is now finished.

    Raises:
        ArgumentError: the folder holds a run of other settings, or none and ``resume``; or another
            process works there.
        Interrupted: a signal asked to stop; the checkpoint is written.
        RunError: the loss is no longer finite.
    """
    torch.set_num_threads(recipe.hardware.threads)
    workers = Workers(recipe.hardware)
    failed = False
    try:
        with locked(folder, workers):
            state = find_state(folder, recipe, must=resume, again=again)
            run = Run(recipe, folder, workers, state)
            _check_order(run, phases)
            workers.wait()  # until every process has read the checkpoint
            if workers.first:
                _execute_and_show(run, console, phases, fresh=state is None)
                return report(run, console) if run.phase == DONE else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the first process says it
                run.execute(until=phases[-1])
            return None
    except Interrupted:  # by all of them
        raise
    except BaseException:
        failed = True
        raise
    finally:
        workers.close(failed)


def find_state(
    folder: Path, recipe: Recipe, must: bool = False, again: bool = False
) -> dict[str, Any] | None:
    """The state in ``folder`` that a run of ``recipe`` goes on from; None to start anew.

    Raises:
        ArgumentError: the state is of other settings; or ``must``, and there is none.
        FileFormatError: all checkpoints are damaged.
    """
    state = Checkpoints(folder).newest()
    if state is None:
        if must:
            raise ArgumentError(f"nothing to resume in '{folder}': it has no checkpoint")
        return None
    known = isinstance(state.get("recipe"), dict) and {"trainer", "history"} <= state.keys()
    if not known or state.get("phase") not in (*PHASES, DONE):
        raise FileFormatError(
            f"the checkpoints in '{folder}' are of no run: name another folder with --out"
        )
    finished = state["phase"] == DONE
    if finished and again and not must:
        return None
    other = differing_settings(recipe_from_dict(state["recipe"]).identity(), recipe.identity())
    if other:
        raise ArgumentError(
            f"the {'finished' if finished else 'unfinished'} run in '{folder}' has other settings "
            f"({', '.join(other)}): name another folder with --out, or delete this one"
        )
    return state


def progress(folder: Path) -> str | None:
    """How far the interrupted run in ``folder`` is, in words; None where nothing can be resumed."""
    state = Checkpoints(folder).newest()
    if state is None:
        return None
    if state["trainer"] is None:
        return f"before the phase '{state['phase']}'" if state["phase"] != DONE else "at its end"
    return f"after step {state['trainer']['step']:,} of the phase '{state['phase']}'"


def _check_order(run: Run, phases: tuple[str, ...]) -> None:
    if run.phase == DONE or run.phase in phases:
        return
    if run.phases.index(run.phase) < run.phases.index(phases[0]):
        raise ArgumentError(
            f"'{run.files.folder}' is not ready for '{phases[0]}': '{run.phase}' comes first "
            f"(polarfast {run.phase}, or polarfast run for all of it)"
        )


def _execute_and_show(run: Run, console: Console, phases: tuple[str, ...], fresh: bool) -> None:
    run.files.prepare()
    if fresh:
        _refuse_strangers(run)
        run.checkpoints.clear()
        run.files.clear()
    write_text(run.files.path("recipe"), sealed_yaml(to_yaml(run.recipe)))
    # Until the display is closed, log lines would tear it: they become notes.
    observers: list[Observer] = [
        TensorBoardLog(run.files.path("tensorboard"), len(run.history)),
        JsonLog(run.files.path("metrics"), run.history),
    ]
    display = make_display(console)  # last: it must not be left running if the above fail
    observers.append(display)
    run.observers = observers
    handler = _Notes(display)
    logging.getLogger("polarfast").addHandler(handler)
    try:
        display.note(introduction(run))
        if not fresh:
            display.note(_place(run, phases))
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _shower(display)
            run.execute(until=phases[-1])
    finally:
        logging.getLogger("polarfast").removeHandler(handler)
        for observer in observers:
            observer.close()


def _refuse_strangers(run: Run) -> None:
    """Results without a checkpoint are not this program's to replace.

    Raises:
        ArgumentError: there are some in the run's folder.
    """
    if run.checkpoints.numbered():
        return
    for name in ("dense", "pruned", "slim", "plan", "results"):
        if (path := run.files.path(name)).exists():
            raise ArgumentError(
                f"'{path}' would be overwritten, and its folder holds no run that could go on: "
                "name another folder with --out, or move it away"
            )


def _place(run: Run, phases: tuple[str, ...]) -> str:
    """Where a run goes on, or that nothing is left to do."""
    if run.phase == DONE:
        return f"The run in {run.files.folder} is finished"
    if run.phase not in phases:
        return f"{progress(run.files.folder)}: nothing left of '{phases[-1]}'".capitalize()
    return f"Going on in {run.files.folder}, {progress(run.files.folder)}"


def introduction(run: Run) -> str:
    """One line on what is about to be done."""
    recipe, data = run.recipe, run.data
    channels, height, width = data.image_shape
    sparsity = recipe.sparsity
    aim = f"lam={sparsity.lam:g}, t={sparsity.t:g}"
    if sparsity.regularizer == "flops-target":
        what = NAMES[recipe.pruning.of]
        aim = f"steered to cut {100 * (sparsity.cut or 0):g} % of the {what}"
    elif sparsity.regularizer != "polarization":
        aim = f"{sparsity.regularizer}, lam={sparsity.lam:g}"
    several = f", {run.workers.world} processes" if run.workers.world > 1 else ""
    return (
        f"{recipe.model} on {recipe.data.title}: {data.train_size:,} images to train and "
        f"{data.test_size:,} to test, {channels}x{height}x{width}; {aim}, "
        f"{recipe.train.epochs} + {recipe.finetune.epochs} epochs{several}"
    )


def _shower(display: Observer) -> Callable[..., None]:
    """Shows what is passed to ``warnings.warn`` as a line of the display, each once."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            display.note(f"Warning: {message}")

    return show


class _Notes(logging.Handler):
    """What is logged as a warning, as lines of the display."""

    def __init__(self, display: Observer) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.note(record.getMessage())


def report(run: Run, console: Console) -> Results:
    """Measure a finished run, draw its figures, write and print its table."""
    results = measure(run)
    draw(run)
    table = results_table(
        results, f"{run.recipe.model} on {run.recipe.data.title}, {_method(run.recipe)}"
    )
    page = Console(width=100, file=io.StringIO(), record=True)
    page.print(table)
    write_text(run.files.path("results_table"), page.export_text())
    write_text(run.files.path("results"), json.dumps(sealed(results.to_dict()), indent=2) + "\n")
    console.print()
    console.print(table)
    console.print(
        f"Model, plan, figures and logs are in {run.files.folder}{os.sep}", highlight=False
    )
    return results


def _method(recipe: Recipe) -> str:
    names = {
        "polarization": "polarization pruning",
        "flops-target": "polarization pruning",
        "l1": "network slimming",
        "deephoyer": "DeepHoyer",
    }
    by_method = {"uniform": "uniform width", "random": "random channels", "none": "not pruned"}
    method = recipe.pruning.method
    return by_method.get(method) or names.get(recipe.sparsity.regularizer, f"{method} pruning")


def measure(run: Run) -> Results:
    """The figures of a finished run; latency is measured now."""
    plan, slim = run.files.plan(), run.networks.slim()
    # Beside a network that was narrow from the start stands the wide one, untrained.
    untrained = run.phases[0] == "prune"
    dense = run.networks.build().to(run.workers.device) if untrained else run.networks.plain_dense()
    planned = plan.inputs["shape"][0]  # images of one forward pass
    images = run.data.example(max(BATCHES))
    latency = {
        batch: Pair(*median_latencies([dense, slim], images[:batch], seconds=LATENCY_SECONDS))
        for batch in BATCHES
    }
    return Results(
        accuracy_dense=None if untrained else run.facts["accuracy_dense"],
        accuracy_pruned=run.facts["accuracy_pruned"],
        accuracy_finetuned=run.facts["accuracy_finetuned"],
        macs=Pair(plan.macs_before // planned, plan.macs // planned),
        params=Pair(plan.params_before, plan.params),
        file_bytes=Pair(_saved_bytes(dense), run.files.path("slim").stat().st_size),
        latency_ms=latency,
        epochs=Pair(len(run.history), sum(epoch["computed"] for epoch in run.history)),
        threads=torch.get_num_threads(),
        verified_error=run.facts["verified_error"],
        seconds=run.facts["seconds"],
        device=device_name(run.workers.device),
    )


def _saved_bytes(model: torch.nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def draw(run: Run) -> None:
    """The figures of a finished run: what became of γ, and the channels kept."""
    plan, folder = run.files.plan(), run.files.folder
    if run.phases[0] == "prune":
        return
    scales = run.networks.scales(run.networks.dense())
    limits = {name: layer.threshold for name, layer in plan.layers.items()}
    figures.gamma_histogram(folder / "gamma_histogram.png", scales, plan.kept, limits)
    if run.gammas:
        every = [counts.sum(0) for counts in run.gammas]
        figures.gamma_over_epochs(folder / "gamma_over_epochs.png", every)
    figures.channels_kept(
        folder / "channels_kept.png",
        {name: len(plan.kept[name]) for name in scales},
        {name: gamma.numel() for name, gamma in scales.items()},
    )
