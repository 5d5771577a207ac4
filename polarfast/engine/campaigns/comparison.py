"""Runs of polarization and its rivals under the same budget: same schedule, as many epochs."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from ...errors import ArgumentError
from ...profiling import device_name, median_latencies
from ..data.source import load
from ..distributed import Workers
from ..figures import save, subplots
from ..folder import NAMES, write_text
from ..launch import find_state
from ..recipe import Recipe
from ..results import read_results
from ..run import Run
from .rivals import DENSE, METHODS, PLAIN, method_recipe
from .trials import Trial, run_all

LATENCY_BATCH, LATENCY_SECONDS = 64, 60.0
#: Colour (Okabe-Ito) and marker of each method, so that neither is needed alone.
STYLES = {
    DENSE: ("#000000", "*"),
    "polarization": ("#0072B2", "o"),
    "network-slimming": ("#D55E00", "s"),
    "deephoyer": ("#009E73", "^"),
    "uniform": ("#CC79A7", "D"),
    "random": ("#E69F00", "v"),
    "no-penalty": ("#56B4E9", "P"),
    "no-penalty-relative": ("#F0E442", "X"),
    "taylor": ("#7F7F7F", "p"),
}
HEADINGS = (
    "method",
    "MACs cut asked",
    "MACs cut %",
    "right after pruning %",
    "accuracy %",
    "against dense",
    "latency ms",
)


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
    """Run what is not finished, measure all networks together, and write ``compare.json``.

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


def chains(
    recipe: Recipe,
    methods: Sequence[str],
    cuts: Sequence[float],
    seeds: int,
    lams: Mapping[str, float],
) -> list[list[Trial]]:
    """All trials; those of a chain share one sparsity training where it does not depend on the cut.

    The dense network shares its training with the methods that prune it as it is.

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
            if method in PLAIN and method != "uniform":
                plain += [dataclasses.replace(trial, trained=first.name) for trial in trials]
            elif method in ("polarization", "uniform"):
                found += [[trial] for trial in trials]
            else:
                found.append(trials)
        found.append(plain)
    return found


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
        results = read_results(folder / trial.name / NAMES["results"])
        outcome = Outcome(
            method,
            asked,
            trial.recipe.seed,
            results.accuracy_pruned,
            results.accuracy_finetuned,
            results.macs.cut,
            results.macs.slim,
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
    data = load(recipe.data, workers.device)
    for trial in trials:
        state = find_state(folder / trial.name, trial.recipe)
        run = Run(trial.recipe, folder / trial.name, workers, state, data)
        networks.append(run.networks.slim())
    images = data.example(LATENCY_BATCH)
    return median_latencies(networks, images, seconds=LATENCY_SECONDS)


def table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """For the terminal."""
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    last: float | None = None
    for row, line in zip(rows, cells(rows), strict=True):
        if row.asked != last:
            shown.add_section()
            last = row.asked
        shown.add_row(*line)
    return shown


def markdown(rows: Sequence[Row], title: str, caption: str) -> str:
    """For a file that is committed."""
    lines = [f"# {title}", "", "| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * 6 + "|"]
    lines += ["| " + " | ".join(line) + " |" for line in cells(rows)]
    return "\n".join([*lines, "", caption, ""])


def caption(recipe: Recipe, seeds: int, lams: Mapping[str, float]) -> str:
    """How the table came about."""
    data = recipe.data
    device = device_name(Workers(recipe.hardware).device)
    own = "".join(f", {lam:g} for {name}" for name, lam in lams.items())
    return (
        f"{recipe.model} on {data.title}; {recipe.train.epochs} + {recipe.finetune.epochs} epochs "
        f"for every method; mean ± standard deviation over {seeds} seed(s). λ = "
        f"{recipe.sparsity.lam:g}{own}; polarization's is where it starts. Accuracy: on "
        f"{'held-out training' if data.validation else 'test'} images, fine-tuned. Latency: "
        f"median, batch {LATENCY_BATCH}, all networks in turns on {device}, "
        f"{recipe.hardware.threads} thread(s)."
    )


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy against MACs and against latency: means, with whiskers of one deviation."""
    figure, panels = subplots(2, 9.5, 4.0)
    for axes, name, scale, label in (
        (panels[0], "macs", 1e-6, "MACs an image (millions)"),
        (panels[1], "latency", 1.0, f"latency of a batch of {LATENCY_BATCH} (ms, median)"),
    ):
        for method, (colour, marker) in STYLES.items():
            chosen = [row for row in rows if row.method == method]
            if not chosen:
                continue
            across = [[scale * value for value in row.values(name)] for row in chosen]
            up = [row.values("accuracy") for row in chosen]
            axes.errorbar(
                [statistics.fmean(values) for values in across],
                [statistics.fmean(values) for values in up],
                xerr=[_deviation(values) for values in across],
                yerr=[_deviation(values) for values in up],
                color=colour,
                marker=marker,
                markersize=10 if method == DENSE else 6.5,
                linestyle="none" if method == DENSE else "-",
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=METHODS.get(method, "dense"),
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy, fine-tuned (%)")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The paper's Table 3, one row a method and cut."""
    base = {o.seed: o.accuracy for row in rows if row.method == DENSE for o in row.outcomes}
    lines: list[tuple[str, ...]] = []
    for row in rows:
        drops = [o.accuracy - base[o.seed] for o in row.outcomes]
        pruned = row.method not in (DENSE, "uniform")
        lines.append(
            (
                METHODS.get(row.method, "dense, as many epochs"),
                "" if row.asked is None else f"{100 * row.asked:g} %",
                spread([100 * cut for cut in row.values("cut")], 1),
                spread(row.values("pruned")) if pruned else "",
                spread(row.values("accuracy")),
                spread(drops) if row.method != DENSE else "",
                spread(row.values("latency")),
            )
        )
    return lines


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation of the sample."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
