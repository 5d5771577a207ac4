"""The effect of λ and of t on the share cut and on accuracy (Fig. 3)."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ...errors import ArgumentError
from ..figures import BLUE, ORANGE, save, subplots
from ..folder import NAMES, write_text
from ..recipe import Recipe
from ..results import read_results
from .trials import Trial, run_all


@dataclass(frozen=True)
class Point:
    """One setting; lists over the seeds. Shares in [0, 1], accuracies in percent."""

    lam: float
    t: float
    cuts: tuple[float, ...]
    dense: tuple[float, ...]
    finetuned: tuple[float, ...]


def sweep(
    recipe: Recipe,
    lams: Sequence[float],
    ts: Sequence[float],
    seeds: int,
    folder: Path,
    jobs: int,
    note: Callable[[str], None],
) -> list[Point]:
    """Vary λ at the recipe's t, and t at the recipe's λ; write ``sweep.json`` and ``sweep.png``.

    Raises:
        ArgumentError: nothing to vary, or the recipe is not of plain polarization.
        Interrupted, PolarfastError: see ``run_all``.
    """
    if not lams and not ts or seeds < 1:
        raise ArgumentError("lams, ts: give some values of λ or of t to try, and at least one seed")
    if recipe.sparsity.regularizer != "polarization":
        raise ArgumentError("sparsity.regularizer: a sweep is of 'polarization', with t fixed")
    settings = dict.fromkeys(
        [(lam, recipe.sparsity.t) for lam in lams] + [(recipe.sparsity.lam, t) for t in ts]
    )
    trials = [_trial(recipe, lam, t, seed) for lam, t in settings for seed in range(seeds)]
    run_all([[trial] for trial in trials], folder, jobs, note)
    points = [_point(recipe, lam, t, seeds, folder) for lam, t in settings]
    content = [dataclasses.asdict(point) for point in points]
    write_text(folder / "sweep.json", json.dumps(content, indent=2) + "\n")
    plot(points, recipe, folder / "sweep.png")
    return points


def _trial(recipe: Recipe, lam: float, t: float, seed: int) -> Trial:
    sparsity = dataclasses.replace(recipe.sparsity, lam=lam, t=t)
    changed = dataclasses.replace(recipe, sparsity=sparsity, seed=recipe.seed + seed)
    return Trial(f"lam{lam:g}-t{t:g}-seed{recipe.seed + seed}", changed)


def _point(recipe: Recipe, lam: float, t: float, seeds: int, folder: Path) -> Point:
    values = []
    for seed in range(seeds):
        results = read_results(folder / _trial(recipe, lam, t, seed).name / NAMES["results"])
        assert results.accuracy_dense is not None  # a sweep is of polarization
        values.append((results.macs.cut, results.accuracy_dense, results.accuracy_finetuned))
    cuts, dense, finetuned = zip(*values, strict=True)
    return Point(lam, t, cuts, dense, finetuned)


def table(points: Sequence[Point], title: str) -> Table:
    """For the terminal."""
    shown = Table(title=title, title_justify="left")
    for heading in ("λ", "t", "MACs cut %", "accuracy % before", "fine-tuned %"):
        shown.add_column(heading, justify="right")
    for point in points:
        means = [
            100 * statistics.fmean(point.cuts),
            *map(statistics.fmean, (point.dense, point.finetuned)),
        ]
        cut, dense, finetuned = means
        shown.add_row(
            f"{point.lam:g}", f"{point.t:g}", f"{cut:.1f}", f"{dense:.2f}", f"{finetuned:.2f}"
        )
    return shown


def plot(points: Sequence[Point], recipe: Recipe, path: Path) -> None:
    """Share cut and loss of accuracy against t, and against λ (Fig. 3)."""
    of_t = sorted((p for p in points if p.lam == recipe.sparsity.lam), key=lambda p: p.t)
    of_lam = sorted((p for p in points if p.t == recipe.sparsity.t), key=lambda p: p.lam)
    figure, panels = subplots(2, 9.5, 3.8)
    fixed = (f"λ = {recipe.sparsity.lam:g}", f"t = {recipe.sparsity.t:g}")
    for axes, chosen, name, still in zip(panels, (of_t, of_lam), ("t", "lam"), fixed, strict=True):
        across = [getattr(point, name) for point in chosen]
        cuts = [100 * statistics.fmean(point.cuts) for point in chosen]
        drops = [
            statistics.fmean(a - b for a, b in zip(p.dense, p.finetuned, strict=True))
            for p in chosen
        ]
        axes.plot(across, cuts, "o-", color=BLUE, label="MACs cut (%, left)")
        axes.set_ylim(0, 100)
        axes.set_ylabel("MACs cut (%)")
        right = axes.twinx()
        right.plot(across, drops, "s--", color=ORANGE, label="accuracy lost (points, right)")
        right.set_ylabel("accuracy lost by pruning, fine-tuned (points)")
        right.spines["top"].set_visible(False)
        axes.set_xlabel({"t": "t", "lam": "λ"}[name] + f"   ({still})")
        if name == "lam" and len(across) > 1 and min(across) > 0:
            axes.set_xscale("log")
        lines = [*axes.get_lines(), *right.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)
    save(figure, path)
