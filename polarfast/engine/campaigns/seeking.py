"""Algorithm 1 over whole trainings: each trial of (λ, t) is a resumable run in a folder."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import polarfast as pf

from ...errors import ArgumentError
from ..data.source import DataSource, load
from ..distributed import Workers
from ..folder import write_text
from ..launch import find_state
from ..lock import locked
from ..recipe import Pruning, Recipe, differing_settings, load_recipe, to_yaml
from ..run import Run

JOURNAL, RECIPE = "search.jsonl", "search.yaml"
WARM = "warm-start"


def seek(
    recipe: Recipe,
    cut: float,
    folder: Path,
    note: Callable[[str], None],
    warm_epochs: int = 0,
    **settings: Any,
) -> pf.SearchResult:
    """Find λ and t for a share of the MACs to cut, by sparsity training alone.

    Finished trials are read from the journal in ``folder``; the one that was interrupted goes on
    from its checkpoint.

    Args:
        cut, settings: of ``pf.search``.
        warm_epochs: if above 0, all trials start from one network that was trained for so many
            epochs without a regularizer, its schedule the recipe's made as short.
        note: told of every epoch.

    Raises:
        ArgumentError: the recipe is not of polarization with the valley rule, or the trials in
            ``folder`` are of another one; or another process works there.
        Interrupted: a signal asked to stop; the trial's checkpoint is written.
        SearchError: the share cannot be reached; the message lists the trials.
    """
    if recipe.sparsity.regularizer != "polarization" or recipe.pruning.method != "valley":
        raise ArgumentError(
            "search is for sparsity.regularizer 'polarization' and pruning.method 'valley'"
        )
    torch.set_num_threads(recipe.hardware.threads)
    workers = Workers(recipe.hardware)
    if workers.world > 1:
        raise ArgumentError("search: runs in one process; start it without torchrun")
    with locked(folder):
        return _seek(recipe, cut, folder, note, workers, warm_epochs, settings)


def _seek(
    recipe: Recipe,
    cut: float,
    folder: Path,
    note: Callable[[str], None],
    workers: Workers,
    warm_epochs: int,
    settings: dict[str, Any],
) -> pf.SearchResult:
    data = load(recipe.data, workers.device)
    if warm_epochs:
        recipe = _warm_start(recipe, warm_epochs, folder, workers, data, note)
    _check_recipe(recipe, folder)

    def train(lam: float, t: float) -> Iterator[float]:
        sparsity = dataclasses.replace(recipe.sparsity, lam=lam, t=t)
        trial = dataclasses.replace(recipe, sparsity=sparsity)
        path = folder / f"lam{lam!r}-t{t!r}"
        run = Run(trial, path, workers, find_state(path, trial), data)
        for epoch, share in enumerate(run.trial(), 1):
            note(f"λ={lam:g} t={t:g}: {100 * share:5.1f} % cut after epoch {epoch}")
            yield share

    return pf.search(train, cut=cut, journal=folder / JOURNAL, **settings)


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """The journal knows λ and t alone: its trials must not count for another recipe."""
    path = folder / RECIPE
    if not path.is_file():
        write_text(path, to_yaml(recipe))
        return
    other = set(differing_settings(load_recipe(path).identity(), recipe.identity()))
    if other := other - {"sparsity.lam", "sparsity.t"}:
        raise ArgumentError(
            f"the search in '{folder}' is of other settings ({', '.join(sorted(other))}): name "
            "another folder with --out, or delete this one"
        )


def _warm_start(
    recipe: Recipe,
    epochs: int,
    folder: Path,
    workers: Workers,
    data: DataSource,
    note: Callable[[str], None],
) -> Recipe:
    """The recipe, starting from weights trained without a regularizer."""
    sparsity = dataclasses.replace(recipe.sparsity, lam=0.0)  # γ are clamped, as they will be
    if recipe.sparsity.gates:
        # Trials get their gates when they start: a warm start is of the network alone.
        changes: dict[str, Any] = {"regularizer": "none", "regularize": "", "gates": ""}
        sparsity = dataclasses.replace(sparsity, init=None, **changes)
    warmup = min(recipe.train.warmup, epochs / 2)
    stage = dataclasses.replace(recipe.train, epochs=epochs, warmup=warmup)
    warm = dataclasses.replace(
        recipe, sparsity=sparsity, train=stage, pruning=Pruning(method="none")
    )
    path = folder / WARM
    run = Run(warm, path, workers, find_state(path, warm), data)
    if run.phase == "train":
        note(f"Warm start: {epochs} epochs without a regularizer")
        run.execute(until="train")
    start = dataclasses.replace(recipe.sparsity, init=None)
    return dataclasses.replace(recipe, weights=str(run.files.path("dense")), sparsity=start)


def table(result: pf.SearchResult, cut: float) -> Table:
    """The trials, in order."""
    shown = Table(title=f"Search for {100 * cut:g} % of the MACs", title_justify="left")
    for heading in ("trial", "λ", "t", "MACs cut %", "epochs"):
        shown.add_column(heading, justify="right")
    for number, trial in enumerate(result.trials, 1):
        shown.add_row(
            str(number),
            f"{trial.lam:g}",
            f"{trial.t:g}",
            f"{100 * trial.cut:.1f}",
            str(trial.epochs),
        )
    return shown
