"""The commands of the command line, each with its options as a dataclass."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from .campaigns import commands as many
from .distributed import speaks
from .interrupts import Interrupted
from .launch import launch, progress
from .recipe import Recipe, load_recipe, recipe_names

Stages = tuple[str, ...]
ALL: Stages = ("train", "prune", "finetune")


def execute(name: str, arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if name in ALL:
        return _recipe_command(name, arguments, lambda options: run(options, (name,)))
    commands: dict[str, Callable[[str, Sequence[str]], int]] = {
        "demo": lambda name, arguments: demo(_parse(DemoOptions, name, arguments)),
        "run": lambda name, arguments: _recipe_command(name, arguments, run),
        "compare": lambda name, arguments: _recipe_command(
            name, arguments, lambda options: _many(options, many.compare), many.CompareOptions
        ),
        "sweep": lambda name, arguments: _recipe_command(
            name, arguments, lambda options: _many(options, many.sweep), many.SweepOptions
        ),
        "search": lambda name, arguments: _recipe_command(
            name, arguments, lambda options: _many(options, many.search), many.SearchOptions
        ),
        "report": lambda name, arguments: _report(_parse(many.ReportOptions, name, arguments)),
    }
    return commands[name](name, arguments)


def _many(options: Any, work: Callable[[Any, Console], None]) -> int:
    """Work on many runs, each of which goes on where it was stopped."""
    try:
        work(options, Console())
        return 0
    except Interrupted as stop:
        print(f"\nS{str(stop)[1:]}; every run has its checkpoint: the same command goes on.")
        return 128 + stop.number


def _report(options: many.ReportOptions) -> int:
    many.report(options, Console())
    return 0


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
    return _guarded(
        options.out,
        lambda: launch(recipe, options.out, Console(), resume=options.resume, again=True),
    )


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


def run(options: RunOptions, phases: Stages = ALL) -> int:
    """All stages of a recipe, or some."""
    if options.dry_run:
        from .estimates import dry_run

        dry_run(options.recipe, Console())
        return 0
    return _guarded(
        options.out,
        lambda: launch(options.recipe, options.out, Console(), phases, options.resume),
    )


def _recipe_command(
    name: str, arguments: Sequence[str], command: Callable[[Any], int], kind: type = RunOptions
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


def _parse(kind: Any, name: str, arguments: Sequence[str], default: Any = None) -> Any:
    given = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=f"polarfast {name}",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
        **given,
    )


def _guarded(folder: Path, work: Callable[[], object]) -> int:
    """Do it; if a signal stops it, say how to go on."""
    try:
        work()
        return 0
    except (Interrupted, KeyboardInterrupt) as stop:
        if speaks():
            what = f"S{str(stop)[1:]}" if isinstance(stop, Interrupted) else "Interrupted"
            done = progress(folder)
            again = "; run the same command again to go on" if done else ""
            print(f"\n{what} {done or 'before the first checkpoint'}{again}.")
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
