"""The command line: ``polarfast demo | info``."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .errors import ArgumentError, PolarfastError

INTERRUPTED = 130  # the shell's exit status for a program stopped by Ctrl-C
EXTRA = ("tyro", "rich", "yaml", "sklearn", "matplotlib", "tensorboard")


def demo(
    quick: bool = False,
    resume: bool = False,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 1,
) -> int:
    """Prune a ResNet-20 on 1,797 real images, start to finish, in about two minutes.

    Sparsity training, thresholds, plan, slim model, verification, fine-tuning, then a table and
    figures. Interrupted with Ctrl-C, the same command goes on where it was.

    Args:
        quick: fewer epochs, under 45 seconds.
        resume: go on with the run in OUT, or fail if there is none.
        out: folder of the run.
        seed: of the initial weights and the order of the images.
        device: where to train.
        threads: CPU threads. For a network this small, a second one helps on an idle machine only,
            and slows a busy one down a lot.
    """
    import dataclasses

    import torch
    from rich.console import Console

    from .engine.demo import demo as run_demo
    from .engine.recipe import load_recipe
    from .engine.run import progress

    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device 'cuda': torch finds no usable GPU here; use --device cpu")
    if threads < 1:
        raise ArgumentError(f"threads={threads}: must be at least 1")
    torch.set_num_threads(threads)
    recipe = load_recipe("demo-quick" if quick else "demo")
    recipe = dataclasses.replace(recipe, seed=seed)
    try:
        run_demo(recipe, out, torch.device(device), resume, Console())
    except KeyboardInterrupt:
        done = progress(out)
        if done is None:
            print("\nInterrupted before the first epoch was done: nothing to resume.")
        else:
            print(f"\nInterrupted {done}; run the same command again to go on from there.")
        return INTERRUPTED
    return 0


def info() -> int:
    """Print versions, build flags, SIMD level, threads and GPUs: what a bug report needs."""
    from .info import report

    print(report())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments == ["info"]:  # works with torch alone
            return info()
        missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
        if missing:
            print(
                f"polarfast: this needs {', '.join(missing)}: pip install 'polarfast[train]' "
                "(only 'polarfast info' does without)",
                file=sys.stderr,
            )
            return 1
        return _dispatch(arguments or ["--help"])
    except PolarfastError as error:
        print(f"polarfast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


def _dispatch(arguments: Sequence[str]) -> int:
    import tyro

    return tyro.extras.subcommand_cli_from_dict(
        {"demo": demo, "info": info},
        prog="polarfast",
        description="Polarization pruning of convolutional networks.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
