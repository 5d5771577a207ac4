"""Many runs in one folder, several at a time: finished ones are not run again."""

import dataclasses
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...errors import ArgumentError, PolarfastError
from ..folder import NAMES, Checkpoints
from ..interrupts import Interrupted, StopSignals
from ..launch import find_state, launch
from ..recipe import Pruning, Recipe, Sparsity
from ..run import DONE

POLL_SECONDS = 0.2


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
        ArgumentError: ``jobs`` below 1, or started by torchrun.
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
    with StopSignals() as signals:
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
    for trial in chain:
        if done(folder, trial):
            continue
        path = folder / trial.name
        path.mkdir(parents=True, exist_ok=True)
        if trial.trained is not None:
            _adopt_training(folder / trial.trained, path, trial.recipe)
        with (path / "log.txt").open("a", encoding="utf-8") as log:
            console = Console(file=log, width=100)
            try:
                launch(trial.recipe, path, console)
            except (PolarfastError, Interrupted) as stop:
                console.print(str(stop), markup=False, highlight=False, soft_wrap=True)
                raise SystemExit(1) from stop


def _adopt_training(source: Path, target: Path, recipe: Recipe) -> None:
    """Give a run that has not begun the sparsity training of another one."""
    checkpoints = Checkpoints(target)
    if checkpoints.numbered():
        return
    state = torch.load(source / NAMES["trained"], weights_only=True)
    for name in ("dense", "gammas"):
        if (source / NAMES[name]).is_file():
            shutil.copyfile(source / NAMES[name], target / NAMES[name])
    checkpoints.save({**state, "recipe": recipe.to_dict()})


def _check(process: BaseProcess, chain: Sequence[Trial], folder: Path) -> None:
    if process.exitcode == 0:
        return
    unfinished = next((trial for trial in chain if not done(folder, trial)), chain[-1])
    log = folder / unfinished.name / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    last = lines[-1] if lines else f"its process ended with status {process.exitcode}"
    raise PolarfastError(f"run '{unfinished.name}' failed ({last}); see {log}")


#: Name on the command line -> name in tables.
METHODS = {
    "polarization": "polarization",
    "network-slimming": "network slimming (L1)",
    "deephoyer": "DeepHoyer",
    "uniform": "uniform width",
    "random": "random channels",
}
DENSE = "dense"
_REGULARIZERS = {"network-slimming": "l1", "deephoyer": "deephoyer"}


def method_recipe(recipe: Recipe, method: str, cut: float, lam: float | None = None) -> Recipe:
    """A recipe changed so that one method cuts a share of the MACs; all else stays.

    Polarization steers t until its valleys give the share. Network slimming and DeepHoyer take the
    percentile of |γ| that does, random choice and uniform width the share of every layer that does.
    Only polarization clamps γ.

    Args:
        method: one of ``METHODS``, or "dense", which is trained for as long and not pruned.
        lam: λ in place of the recipe's.
    """
    changes: dict[str, Any]
    sparsity = recipe.sparsity if lam is None else dataclasses.replace(recipe.sparsity, lam=lam)
    if method == "polarization":
        sparsity = dataclasses.replace(sparsity, regularizer="flops-target", cut=cut)
        pruning = dataclasses.replace(recipe.pruning, method="valley", value=None, cut=None)
    elif method in _REGULARIZERS:
        changes = {"regularizer": _REGULARIZERS[method], "upper": None, "clamp": "scales"}
        sparsity = dataclasses.replace(sparsity, **changes, cut=None)
        pruning = dataclasses.replace(recipe.pruning, method="percentile", value=None, cut=cut)
    elif method in ("uniform", "random"):
        sparsity = _plain(sparsity)
        changes = {"method": method, "value": None, "cut": cut}
        pruning = dataclasses.replace(recipe.pruning, **changes)
    elif method == DENSE:
        sparsity = _plain(sparsity)
        pruning = Pruning(method="none")
    else:
        known = ", ".join(METHODS)
        raise ArgumentError(f"methods: '{method}' is not known; choose from {known}")
    return dataclasses.replace(recipe, sparsity=sparsity, pruning=pruning)


def _plain(sparsity: Sparsity) -> Sparsity:
    """Training without a regularizer."""
    return dataclasses.replace(sparsity, regularizer="none", init=None, upper=None, cut=None)


def chains(
    recipe: Recipe,
    methods: Sequence[str],
    cuts: Sequence[float],
    seeds: int,
    lams: Mapping[str, float],
) -> list[list[Trial]]:
    """All trials; those of a chain share one sparsity training where it does not depend on the cut.

    The dense network shares its training with random choice.

    Raises:
        ArgumentError: a method that is not known, or something given twice.
    """
    for method in lams:
        method_recipe(recipe, method, 0.5)  # refuses what is not known
    if DENSE in methods:
        raise ArgumentError(f"methods: '{DENSE}' is compared with all others anyway; leave it out")
    for name, given in (("methods", methods), ("cuts", cuts)):
        if len(set(given)) < len(given):
            raise ArgumentError(f"{name}: {', '.join(map(str, given))}: one of them is given twice")
    found = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        seeded = dataclasses.replace(recipe, seed=seed)
        first = Trial(f"{DENSE}-seed{seed}", method_recipe(seeded, DENSE, 0.5))
        plain = [first]
        for method in methods:
            trials: list[Trial] = []
            for cut in cuts:
                changed = method_recipe(seeded, method, cut, lams.get(method))
                name = f"{method}-{100 * cut:g}-seed{seed}"
                alone = method in ("polarization", "uniform") or not trials
                trials.append(Trial(name, changed, None if alone else trials[0].name))
            if method == "random":
                plain += [dataclasses.replace(trial, trained=first.name) for trial in trials]
            elif method in ("polarization", "uniform"):
                found += [[trial] for trial in trials]
            else:
                found.append(trials)
        found.append(plain)
    return found
