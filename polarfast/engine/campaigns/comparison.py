"""Runs of polarization and its rivals under the same budget: same schedule, as many epochs."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from polarfast.engine.artifacts import NAMES
from polarfast.engine.campaigns.rivals import DENSE, METHODS, chains
from polarfast.engine.campaigns.trials import Trial, run_all
from polarfast.engine.checkpoint import write_text
from polarfast.engine.data import load as load_data
from polarfast.engine.launch import find_state
from polarfast.engine.recipe import Recipe
from polarfast.engine.run import Run
from polarfast.engine.workers import Workers
from polarfast.errors import ArgumentError
from polarfast.timing import median_latencies

LATENCY_BATCH, LATENCY_SECONDS = 64, 60.0


@dataclass(frozen=True)
class Outcome:
    """What one run came to: percent, shares, ms."""

    method: str
    asked: float | None
    seed: int
    pruned: float
    accuracy: float
    cut: float
    macs: float
    latency: float


@dataclass(frozen=True)
class Row:
    """One method at one cut: lists over the seeds, in the same order."""

    method: str
    asked: float | None
    outcomes: tuple[Outcome, ...]

    def values(self, name: str) -> list[float]:
        """One quantity, of every seed."""
        return [getattr(outcome, name) for outcome in self.outcomes]


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    cuts: Sequence[float],
    seeds: int,
    lams: Mapping[str, float],
    folder: Path,
    jobs: int,
    note: Callable[[str], None],
) -> list[Row]:
    """Run what is not finished, measure all networks together, and write ``compare.*``.

    Raises:
        ArgumentError: an unknown method, a cut outside (0, 1), fewer than one seed.
        Interrupted, PolarfastError: see ``run_all``.
    """
    if seeds < 1 or not methods or not cuts:
        raise ArgumentError("give at least one of methods, of cuts, and of seeds")
    todo = chains(recipe, methods, cuts, seeds, lams)
    run_all(todo, folder, jobs, note)
    trials = [trial for chain in todo for trial in chain]
    rows = _rows(trials, folder, note)
    content = [dataclasses.asdict(row) for row in rows]
    write_text(folder / "compare.json", json.dumps(content, indent=2) + "\n")
    return rows


def _rows(trials: Sequence[Trial], folder: Path, note: Callable[[str], None]) -> list[Row]:
    note(f"Measuring the latency of {len(trials)} networks, taking turns")
    latencies = _latencies(trials, folder)
    grouped: dict[tuple[str, float | None], list[Outcome]] = {}
    for trial, latency in zip(trials, latencies, strict=True):
        method = trial.name.rpartition("-seed")[0]
        asked = None
        if method != DENSE:
            method, _, percent = method.rpartition("-")
            asked = float(percent) / 100
        results = json.loads((folder / trial.name / NAMES["results"]).read_text("utf-8"))
        macs = results["macs"]
        outcome = Outcome(
            method,
            asked,
            trial.recipe.seed,
            results["accuracy_pruned"],
            results["accuracy_finetuned"],
            1 - macs["slim"] / macs["dense"],
            macs["slim"],
            latency,
        )
        grouped.setdefault((method, asked), []).append(outcome)
    order = [DENSE, *METHODS]
    keys = sorted(grouped, key=lambda key: (key[1] or 0.0, order.index(key[0])))
    return [Row(*key, tuple(sorted(grouped[key], key=lambda o: o.seed))) for key in keys]


def _latencies(trials: Sequence[Trial], folder: Path) -> list[float]:
    """Median ms of a batch, measured in turns, so that all see the same machine."""
    networks: list[nn.Module] = []
    recipe = trials[0].recipe
    torch.set_num_threads(recipe.hardware.threads)
    workers = Workers(recipe.hardware)
    data = load_data(recipe.data, workers.device)
    for trial in trials:
        state = find_state(folder / trial.name, trial.recipe)
        run = Run(trial.recipe, folder / trial.name, workers, state, data)
        networks.append(run.networks.slim())
    images = data.example(LATENCY_BATCH)
    return median_latencies(networks, images, seconds=LATENCY_SECONDS)
