"""The commands of the command line, each with its options as a dataclass.

Nothing here needs torch until a command is carried out: help and wrong options answer at once.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from ..errors import ArgumentError
from ..steering.search import Stability
from .campaigns.rivals import METHODS
from .interrupts import Interrupted
from .ranges import check_ranges
from .recipe import PHASES, Recipe, load_recipe, recipe_names

Options = TypeVar("Options")


def execute(name: str, arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if name in PHASES:
        return _recipe_command(name, arguments, RunOptions, lambda options: run(options, (name,)))
    if name == "demo":
        return demo(_parse(DemoOptions, name, arguments))
    if name == "report":
        return report(_parse(ReportOptions, name, arguments))
    if name == "run":
        return _recipe_command(name, arguments, RunOptions, run)
    many: dict[str, tuple[Any, Callable[[Any, Console], None]]] = {
        "compare": (CompareOptions, compare),
        "sweep": (SweepOptions, sweep),
        "search": (SearchOptions, search),
        "latency": (LatencyOptions, latency),
    }
    kind, work = many[name]
    return _recipe_command(name, arguments, kind, lambda options: _resumable(options, work))


def _recipe_command(
    name: str, arguments: Sequence[str], kind: Any, command: Callable[[Any], int]
) -> int:
    """A command whose first argument is a recipe and whose options are the recipe's settings."""
    if not arguments or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(
            f"usage: polarfast {name} RECIPE [options]; polarfast {name} RECIPE --help shows them\n"
            f"RECIPE: a .yaml file, or one of {', '.join(recipe_names())}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    chosen, *rest = arguments
    recipe = load_recipe(chosen)
    folder = Path(chosen).stem if kind is RunOptions else f"{name}-{Path(chosen).stem}"
    default = kind(recipe=recipe, out=Path("runs") / folder)
    return command(_parse(kind, f"{name} {chosen}", rest, default))


def _parse(
    kind: type[Options], name: str, arguments: Sequence[str], default: Options | None = None
) -> Options:
    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=f"polarfast {name}",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
        **given,
    )


@dataclass(frozen=True)
class DemoOptions:
    """Prune a ResNet-20 on 1,797 real images, start to finish, in about two minutes.

    Sparsity training, thresholds, plan, slim model, verification, fine-tuning, then a table and
    figures. Interrupted with Ctrl-C, the same command goes on where it was.

    Attributes:
        quick: fewer epochs, under 45 seconds.
        resume: go on with the run in OUT, or fail if there is none.
        out: folder of the run.
        seed: of the initial weights and the order of the images.
        device: where to train.
        threads: CPU threads. For a network this small, a second one helps on an idle machine only,
            and slows a busy one down a lot.
    """

    quick: bool = False
    resume: bool = False
    out: Path = Path("runs/demo")
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1


def demo(options: DemoOptions) -> int:
    """The packaged recipe "demo", in its long or short form."""
    recipe = load_recipe("demo-quick" if options.quick else "demo")
    hardware = dataclasses.replace(recipe.hardware, device=options.device, threads=options.threads)
    recipe = dataclasses.replace(recipe, seed=options.seed, hardware=hardware)
    return _launch(recipe, options.out, PHASES, options.resume, again=True)


@dataclass(frozen=True)
class RunOptions:
    """Sparsity training, pruning and fine-tuning of a recipe.

    Attributes:
        recipe: every setting of the recipe.
        out: folder of the run; by default runs/RECIPE.
        resume: go on with the run in OUT, or fail if there is none.
        dry_run: only print the recipe, the model, steps, memory and time.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    resume: bool = False
    dry_run: bool = False


def run(options: RunOptions, phases: tuple[str, ...] = PHASES) -> int:
    """All phases of a recipe, or some."""
    if options.dry_run:
        from .estimates import dry_run

        dry_run(options.recipe, Console())
        return 0
    return _launch(options.recipe, options.out, phases, options.resume)


def _launch(
    recipe: Recipe, folder: Path, phases: tuple[str, ...], resume: bool, again: bool = False
) -> int:
    """Do it; if a signal stops it, say how to go on."""
    from .distributed import speaks
    from .launch import launch, progress

    try:
        launch(recipe, folder, Console(), phases, resume, again)
        return 0
    except (Interrupted, KeyboardInterrupt) as stop:
        if speaks():
            what = f"S{str(stop)[1:]}" if isinstance(stop, Interrupted) else "Interrupted"
            done = progress(folder)
            going_on = "; run the same command again to go on" if done else ""
            print(f"\n{what} {done or 'before the first checkpoint'}{going_on}.")
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)


def _resumable(options: Any, work: Callable[[Any, Console], None]) -> int:
    """Work on many runs, each of which goes on where it was stopped."""
    try:
        work(options, Console())
        return 0
    except Interrupted as stop:
        print(f"\nS{str(stop)[1:]}; every run has its checkpoint: the same command goes on.")
        return 128 + stop.number


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

    def __post_init__(self) -> None:
        check_ranges(self, seeds=(1, 1000), jobs=(1, 1024))


def compare(options: CompareOptions, console: Console) -> None:
    """Run what is missing; print and write the table and the plot."""
    from .campaigns import comparison
    from .folder import write_text

    recipe, out, lams = options.recipe, options.out, dict(map(_strength, options.lams))
    rows = comparison.compare(
        recipe,
        options.methods,
        options.cuts,
        options.seeds,
        lams,
        out,
        options.jobs,
        _noter(console),
    )
    title = f"{recipe.model} on {recipe.data.title}"
    used = {method: lam for method, lam in lams.items() if method in options.methods}
    caption = comparison.caption(recipe, options.seeds, used)
    console.print(comparison.table(rows, title, caption))
    write_text(out / "compare.md", comparison.markdown(rows, title, caption))
    comparison.plot(rows, out / "compare.png", title)
    console.print(f"Table and plot are in {out}/compare.*", highlight=False)


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

    def __post_init__(self) -> None:
        check_ranges(self, seeds=(1, 1000), jobs=(1, 1024))


def sweep(options: SweepOptions, console: Console) -> None:
    """Run what is missing; print and write the table and the plot."""
    from .campaigns import sweeping

    recipe, out = options.recipe, options.out
    note = _noter(console)
    points = sweeping.sweep(
        recipe, options.lams, options.ts, options.seeds, out, options.jobs, note
    )
    console.print(sweeping.table(points, f"{recipe.model} on {recipe.data.title}"))
    console.print(f"Table and plot are in {out}/sweep.*", highlight=False)


@dataclass(frozen=True)
class SearchOptions:
    """λ and t for a share of the MACs to cut: Algorithm 1, each trial a sparsity training.

    It starts from the recipe's λ and goes outward. A trial is left off as soon as its share is
    stable, or clearly too large. Finished trials are kept in a journal. One training is enough with
    --sparsity.regularizer flops-target.

    Attributes:
        recipe: what is trained; every setting.
        out: folder of the trials; by default runs/search-RECIPE.
        cut: share of the MACs to cut.
        tol: δ, how far from it the result may be.
        max_trials: give up after so many.
        lam_high: bisect λ between 0 and this from the start, as the paper prints the algorithm, in
            place of starting from the recipe's.
        window: a trial's share is stable when the last WINDOW epochs span at most SPREAD.
        spread: see window.
        warm_epochs: train so long without a regularizer first, once, and start every trial there.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    cut: float = tyro.MISSING
    tol: float = 0.05
    max_trials: int = 20
    lam_high: float | None = None
    window: int = Stability.window
    spread: float = Stability.spread
    warm_epochs: int = 0

    def __post_init__(self) -> None:
        counts = {"max_trials": (1, 10**6), "window": (1, 10**6), "warm_epochs": (0, 10**6)}
        check_ranges(self, **counts, lam_high=(0, 1e6), spread=(0, 1))


def search(options: SearchOptions, console: Console) -> None:
    """Search, print the trials, and say how to go on."""
    from .campaigns import seeking
    from .folder import NAMES

    recipe, high = options.recipe, options.lam_high
    console.print(
        f"At most {options.max_trials} trainings of up to {recipe.train.epochs} epochs, "
        + (f"from λ = {recipe.sparsity.lam:g} outward" if high is None else f"λ up to {high:g}")
        + "; 2 to 8 are usual",
        highlight=False,
    )
    result = seeking.seek(
        options.recipe,
        options.cut,
        options.out,
        _noter(console),
        options.warm_epochs,
        tol=options.tol,
        max_trials=options.max_trials,
        lam=recipe.sparsity.lam if high is None else None,
        lam_high=high,
        t=options.recipe.sparsity.t,
        stability=Stability(options.window, options.spread),
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
class LatencyOptions:
    """How long a recipe's network takes on this machine, operator by operator, at many widths.

    With the file that this writes, shares to cut are shares of the time: polarfast run RECIPE
    --pruning.of latency --pruning.latency FILE. Measure where the network will be used; the file
    may be read elsewhere.

    Attributes:
        recipe: its network and data, precision, and hardware (device, threads, channels_last,
            compile) to measure with; every setting.
        out: the file; by default runs/latency-RECIPE.json.
        batch: images of one forward pass.
        step: widths are planned in multiples of this.
        seconds: about how long to measure at most.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    batch: int = 1
    step: int = 8
    seconds: float = 60.0

    def __post_init__(self) -> None:
        check_ranges(self, batch=(1, 2**20), step=(1, 2**20), seconds=(1e-3, 1e6))


def latency(options: LatencyOptions, console: Console) -> None:
    """Measure, write the table, and say how to use it."""
    import torch

    from ..latency.table import LatencyTable
    from .data.source import load
    from .distributed import Workers
    from .folder import Artifacts
    from .networks import Networks

    recipe, file = options.recipe, options.out
    file = file if file.suffix == ".json" else file.with_name(f"{file.name}.json")
    workers = Workers(recipe.hardware)
    data = load(recipe.data, workers.device)
    model, _ = Networks(recipe, data, Artifacts(file.parent), workers.device).fresh()
    layout = torch.channels_last if recipe.hardware.channels_last else torch.contiguous_format
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    table = LatencyTable.measure(
        model,
        data.example(options.batch),
        dtype=dtypes[recipe.precision],
        memory_format=layout,
        compiled=recipe.hardware.compile,
        step=options.step,
        seconds=options.seconds,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    table.save(file)
    _noter(console)(
        f"{table}\nWritten to {file}. Prune by it: polarfast run RECIPE --pruning.of latency "
        f"--pruning.latency {file}"
    )


def _noter(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class ReportOptions:
    """One self-contained HTML page on one or several runs, side by side.

    Attributes:
        runs: folders of runs, finished or not.
        out: the page; by default report.html in the first run's folder.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path | None = None


def report(options: ReportOptions) -> int:
    """Write the page and say where it is."""
    from .report import write_report

    if not options.runs:
        raise ArgumentError("report: give at least one folder of a run, e.g. runs/demo")
    out = options.out or options.runs[0] / "report.html"
    Console().print(f"Report: {write_report(options.runs, out)}", highlight=False)
    return 0
