"""docs/benchmarks.md: the scripts here that are about time, run one after another in short forms.

    python benchmarks/speed_page.py [--write docs/benchmarks.md] [--only stepping ...]

Each runs in a process of its own with one thread, and what it prints goes on the page as it is.
About ten minutes on a machine that does nothing else; otherwise only ratios mean much.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from polarfast.profiling import device_name

HERE = Path(__file__).parent
HEAD = """# What it costs, and what it saves

Written by `make bench`; no figure here is typed in. Measured on {where}, one thread; torch {torch},
Python {python}; {date}.

Elsewhere: [which networks are right](models.md), [accuracy beside other methods](comparison.md),
[how close to the share asked for](flops-target.md).
"""


class Section(NamedTuple):
    """A script, what it shows, and the short form that is run here."""

    name: str
    title: str
    text: str
    arguments: tuple[str, ...] = ()
    markdown: bool = False


SECTIONS = (
    Section(
        "stepping",
        "A training step",
        "`pf.step(optimizer, scales, reg)` in place of `optimizer.step()`: penalty, update, clamp"
        " of all γ of a ResNet-50, with torch's optimizers. The ratio is ours ÷ theirs.",
    ),
    Section("ops", "The operators", "Each beside what one would write with torch's operators."),
    Section(
        "prediction",
        "What a plan would cut",
        "`FlopsTarget` asks this while it trains.",
    ),
    Section(
        "slimming",
        "From a trained network to its slim form",
        "Beside torch-pruning, which does not work out what removed channels leave behind.",
        ("--models", "resnet50", "mobilenet_v2", "--repeats", "3", "--threads", "1"),
    ),
    Section(
        "breakdown",
        "Where the time goes that MACs do not promise",
        "A forward pass by kind of operator, before and after.",
        ("--repeats", "9"),
        markdown=True,
    ),
    Section(
        "putback",
        "Channels put back",
        'What `residual="expand"` pays for cutting the last layer of a residual branch.',
        ("--seconds", "2", "--batches", "1"),
    ),
    Section(
        "latency",
        "Predicted times",
        "How far off a `LatencyTable` is, on three random prunings.",
        ("--models", "mobilenet_v2", "--seconds", "20"),
    ),
)


def run(section: Section) -> str:
    """The section, as markdown."""
    script = f"benchmarks/bench_{section.name}.py"
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *section.arguments],
        cwd=HERE.parent,
        env=environment,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    print(f"{script}: {time.perf_counter() - start:.0f} s", flush=True)
    command = " ".join(("OMP_NUM_THREADS=1 python", script, *section.arguments))
    printed = done.stdout.strip("\n")
    shown = printed if section.markdown else f"```\n{printed}\n```"
    return f"## {section.title}\n\n{section.text}\n\n```\n{command}\n```\n\n{shown}\n"


def main() -> None:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", type=Path, help="the page; without it, it is printed")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    if options.write is not None and options.only != names:
        parser.error("--write takes all of them")
    head = HEAD.format(
        where=device_name(torch.device("cpu")),
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
    )
    page = [head]
    for section in SECTIONS:
        if section.name in options.only:
            page.append(run(section))
            if options.write is not None:  # what there is so far
                options.write.write_text("\n".join(page), encoding="utf-8")
    if options.write is None:
        print("\n".join(page))


if __name__ == "__main__":
    main()
