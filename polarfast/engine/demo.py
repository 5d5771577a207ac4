"""The demonstration: a recipe on real images from start to finish, with its table and figures."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

import polarfast as pf
from polarfast.engine import figures
from polarfast.engine.checkpoint import write_text
from polarfast.engine.display import make_display
from polarfast.engine.events import Observer
from polarfast.engine.latency import median_latencies
from polarfast.engine.recipe import Recipe
from polarfast.engine.recording import JsonLog, TensorBoardLog
from polarfast.engine.results import BATCHES, Pair, Results, results_table
from polarfast.engine.run import CHECKPOINT, DENSE, RESULTS, SLIM, Run, find_checkpoint

TENSORBOARD = "tensorboard"
LATENCY_SECONDS = 1.0  # for each batch size


def demo(
    recipe: Recipe, folder: Path, device: torch.device, resume: bool, console: Console
) -> Results:
    """Run a recipe in ``folder``, or go on where it was interrupted, and print its table.

    Raises:
        ArgumentError: ``resume``, and there is nothing to resume.
    """
    state = find_checkpoint(folder, recipe, must=resume)
    run = Run(recipe, folder, device, state)
    if state is None:
        _clear(folder)
    files: list[Observer] = [
        TensorBoardLog(folder / TENSORBOARD, len(run.history)),
        JsonLog(folder / "metrics.jsonl", run.history),
    ]
    # Last: a live display must not be left running if something above is interrupted.
    display = make_display(console)
    observers = [*files, display]
    run.observers = observers
    try:
        _introduce(run, display.note)
        run.execute()
    finally:
        for observer in observers:
            observer.close()
    return report(run, console)


def report(run: Run, console: Console) -> Results:
    """Measure a finished run, draw its figures, write and print its table."""
    results = measure(run)
    draw(run)
    table = results_table(results, f"{run.recipe.model} on {run.data.name}, polarization pruning")
    page = Console(width=100, file=io.StringIO(), record=True)
    page.print(table)
    write_text(run.folder / "results.txt", page.export_text())
    # Last, since it says that the run is finished.
    write_text(run.folder / RESULTS, json.dumps(results.to_dict(), indent=2) + "\n")
    console.print()
    console.print(table)
    console.print(f"Model, plan, figures and logs are in {run.folder}{os.sep}", highlight=False)
    return results


def measure(run: Run) -> Results:
    """The figures of a finished run; latency is measured now."""
    dense, slim, plan = run.dense(), run.slim(), run.plan()
    images = run.data.test.images
    latency = {
        batch: Pair(*median_latencies([dense, slim], images[:batch], seconds=LATENCY_SECONDS))
        for batch in BATCHES
    }
    return Results(
        accuracy_dense=run.facts["accuracy_dense"],
        accuracy_pruned=run.facts["accuracy_pruned"],
        accuracy_finetuned=run.facts["accuracy_finetuned"],
        macs=Pair(plan.macs_before, plan.macs),
        params=Pair(plan.params_before, plan.params),
        file_bytes=Pair(*((run.folder / name).stat().st_size for name in (DENSE, SLIM))),
        latency_ms=latency,
        threads=torch.get_num_threads(),
        verified_error=run.facts["verified_error"],
        seconds=run.facts["seconds"],
    )


def draw(run: Run) -> None:
    """The three figures of a finished run."""
    scales, plan = run.scales(run.dense()), run.plan()
    figures.gamma_histogram(
        run.folder / "gamma_histogram.png",
        scales,
        plan.kept,
        pf.thresholds(scales, method="valley"),
    )
    if run.histograms:
        figures.gamma_over_epochs(
            run.folder / "gamma_over_epochs.png",
            run.histograms,
            range(1, len(run.histograms) + 1),
        )
    figures.channels_kept(
        run.folder / "channels_kept.png",
        {name: len(plan.kept[name]) for name in scales},
        {name: gamma.numel() for name, gamma in scales.items()},
    )


def _introduce(run: Run, note: Callable[[str], None]) -> None:
    data, recipe = run.data, run.recipe
    channels, height, width = data.image_shape
    note(
        f"{recipe.model} on {data.name}: {len(data.train):,} images to train and "
        f"{len(data.test):,} to test, {channels}x{height}x{width}; lam={recipe.sparsity.lam:g}, "
        f"t={recipe.sparsity.t:g}, {recipe.train.epochs} + {recipe.finetune.epochs} epochs"
    )
    if run.history:
        note(f"Resuming {run.folder} after epoch {len(run.history)}")


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for file in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        file.unlink()
    for name in (CHECKPOINT, RESULTS, "results.txt"):
        (folder / name).unlink(missing_ok=True)
