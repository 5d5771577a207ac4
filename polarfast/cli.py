"""The command line: ``polarfast run RECIPE`` and the rest; the work is in ``engine.commands``."""

import errno
import importlib.util
import sys
from collections.abc import Sequence

from .errors import PolarfastError

#: The disk is full, or a folder can no longer be written to.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
INTERRUPTED = 130  # the shell's exit status for a program stopped by Ctrl-C
EXTRA = ("tyro", "rich", "yaml", "sklearn", "matplotlib", "tensorboard", "torchvision")
COMMANDS = {
    "demo": "prune a ResNet-20 on 1,797 images from start to end, in 2 minutes",
    "run RECIPE": "sparsity training, pruning, fine-tuning",
    "train | prune | finetune RECIPE": "one stage of it alone",
    "search RECIPE --cut 0.54": "λ and t for a share of MACs to cut (Algorithm 1)",
    "compare RECIPE --cuts 0.5 0.7": "polarization and its rivals under the same budget",
    "sweep RECIPE --lams … --ts …": "the effect of λ and of t (Fig. 3)",
    "latency RECIPE": "time its operators, to prune by time (--pruning.of latency)",
    "report RUN…": "one HTML page on one or several runs",
    "info": "versions, build flags, CPU and GPUs: what a bug report needs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    try:
        if name == "info" and not rest:  # works with torch alone
            from .info import report

            print(report())
            return 0
        if name == "info":
            print(f"polarfast info: takes no options, not '{rest[0]}'", file=sys.stderr)
            return 2
        if name not in _names():
            print(f"polarfast: no command '{name}'\n\n{usage()}", file=sys.stderr)
            return 2
        missing = [module for module in EXTRA if importlib.util.find_spec(module) is None]
        if missing:
            print(
                f"polarfast: this needs {', '.join(missing)}: pip install 'polarfast[train]' "
                "(only 'polarfast info' does without)",
                file=sys.stderr,
            )
            return 1
        from .engine.commands import execute

        return execute(name, rest)
    except PolarfastError as error:
        print(f"polarfast: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read what is printed has seen enough
        return 1
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        whole = (
            ". Files written before are whole; once that is mended, the same command goes on from "
            "the last checkpoint"
        )
        advice = whole if error.errno in UNWRITABLE else ""
        print(f"polarfast: {where}{error.strerror or error}{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


def _names() -> list[str]:
    """The words of ``COMMANDS`` that are commands: those in front of RECIPE, RUN and options."""
    words = " ".join(COMMANDS).split()
    return [word for word in words if word.isalpha() and word.islower()]


def usage() -> str:
    """What ``polarfast --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "polarfast: polarization pruning of convolutional networks.",
            "",
            *lines,
            "",
            "RECIPE is a name (polarfast run --help lists them) or a YAML file. Every setting in",
            "it is an option too; polarfast COMMAND RECIPE --help shows all of them:",
            "  polarfast run cifar10-resnet56 --data.root ~/cifar --sparsity.lam 1e-4 --dry-run",
            "  torchrun --nproc-per-node=8 -m polarfast run imagenet-resnet50 --data.root /data",
            "The same command again goes on where it was stopped.",
        ]
    )
