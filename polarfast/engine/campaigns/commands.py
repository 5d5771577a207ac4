"""The commands that make or look at many runs: compare, sweep, search, report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import polarfast as pf

from ...errors import ArgumentError
from ..folder import NAMES, write_text
from ..recipe import Recipe
from .trials import METHODS


@dataclass(frozen=True)
class CompareOptions:
    """Polarization and its rivals under the same budget, as the paper's Table 3, and plots.

    Attributes:
        recipe: schedule, data and model for all; every setting.
        out: folder of all runs; by default runs/compare-RECIPE.
        methods: which to compare, beside the dense network.
        cuts: shares of the MACs to cut.
        seeds: how many runs of each.
        lams: METHOD=λ where a method's differs from the recipe's.
        jobs: runs at a time.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    methods: tuple[str, ...] = tuple(METHODS)
    cuts: tuple[float, ...] = (0.5, 0.7)
    seeds: int = 3
    lams: tuple[str, ...] = ()
    jobs: int = 1


def compare(options: CompareOptions, console: Console) -> None:
    """Run what is missing; print and write the table and the plot."""
    from . import comparison
    from . import comparison as comparison_output

    lams = dict(_strength(pair) for pair in options.lams)
    rows = comparison.compare(
        options.recipe,
        options.methods,
        options.cuts,
        options.seeds,
        lams,
        options.out,
        options.jobs,
        _noter(console),
    )
    title = f"{options.recipe.model} on {options.recipe.data.title}"
    used = {method: lam for method, lam in lams.items() if method in options.methods}
    caption = comparison_output.caption(options.recipe, options.seeds, used)
    console.print(comparison_output.table(rows, title, caption))
    write_text(options.out / "compare.md", comparison_output.markdown(rows, title, caption))
    comparison_output.plot(rows, options.out / "compare.png", title)
    console.print(f"Table and plot are in {options.out}/compare.*", highlight=False)


def _strength(pair: str) -> tuple[str, float]:
    method, _, number = pair.partition("=")
    try:
        return method, float(number)
    except ValueError:
        raise ArgumentError(f"lams: '{pair}' must read METHOD=λ, e.g. deephoyer=1e-3") from None


@dataclass(frozen=True)
class SweepOptions:
    """The effect of λ and of t on the share cut and on accuracy (Fig. 3).

    Attributes:
        recipe: the point around which λ and t vary; every setting.
        out: folder of all runs; by default runs/sweep-RECIPE.
        lams: values of λ, at the recipe's t.
        ts: values of t, at the recipe's λ.
        seeds: runs of each setting.
        jobs: runs at a time.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    lams: tuple[float, ...] = ()
    ts: tuple[float, ...] = ()
    seeds: int = 1
    jobs: int = 1


def sweep(options: SweepOptions, console: Console) -> None:
    """Run what is missing; print and write the table and the plot."""
    from . import sweeping

    points = sweeping.sweep(
        options.recipe,
        options.lams,
        options.ts,
        options.seeds,
        options.out,
        options.jobs,
        _noter(console),
    )
    console.print(sweeping.table(points, f"{options.recipe.model} on {options.recipe.data.title}"))
    console.print(f"Table and plot are in {options.out}/sweep.*", highlight=False)


@dataclass(frozen=True)
class SearchOptions:
    """λ and t for a share of the MACs to cut: Algorithm 1, each trial a sparsity training.

    A trial is left off as soon as its share is stable. Finished trials are kept in a journal.

    Attributes:
        recipe: what is trained; every setting.
        out: folder of the trials; by default runs/search-RECIPE.
        cut: share of the MACs to cut.
        tol: δ, how far from it the result may be.
        max_trials: give up after so many.
        lam_high: where the search for λ begins to halve.
        window: a trial's share is stable when the last WINDOW epochs span at most SPREAD.
        spread: see window.
        warm_epochs: train so long without a regularizer first, once, and start every trial there.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    cut: float = 0.5
    tol: float = 0.05
    max_trials: int = 20
    lam_high: float = 2e-4
    window: int = pf.Stability.window
    spread: float = pf.Stability.spread
    warm_epochs: int = 0


def search(options: SearchOptions, console: Console) -> None:
    """Search, print the trials, and say how to go on."""
    from . import seeking

    result = seeking.seek(
        options.recipe,
        options.cut,
        options.out,
        _noter(console),
        options.warm_epochs,
        tol=options.tol,
        max_trials=options.max_trials,
        lam_high=options.lam_high,
        t=options.recipe.sparsity.t,
        stability=pf.Stability(options.window, options.spread),
    )
    console.print(seeking.table(result, options.cut))
    warm = options.out / seeking.WARM / NAMES["dense"]
    start = f" --weights {warm} --sparsity.init None" if options.warm_epochs else ""
    console.print(
        f"λ = {result.lam:g}, t = {result.t:g} cut {100 * result.cut:.1f} %. Now train in full: "
        f"polarfast run RECIPE --sparsity.lam {result.lam!r} --sparsity.t {result.t!r}{start}",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class ReportOptions:
    """One self-contained HTML page on one or several runs, side by side.

    Attributes:
        runs: folders of runs, finished or not.
        out: the page; by default report.html in the first run's folder.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default=())
    out: Path | None = None


def report(options: ReportOptions, console: Console) -> None:
    """Write the page and say where it is."""
    from ..report import write_report

    if not options.runs:
        raise ArgumentError("report: give at least one folder of a run, e.g. runs/demo")
    out = options.out or options.runs[0] / "report.html"
    console.print(f"Report: {write_report(options.runs, out)}", highlight=False)


def _noter(console: Console) -> Callable[[str], None]:
    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    return note
