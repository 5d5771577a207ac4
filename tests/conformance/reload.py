"""Run as a process of its own: load pruned networks from files and write what they compute.

    python -m conformance.reload FOLDER PRUNER NAME...

FOLDER holds, for each name, NAME.model, written by the pruner, and NAME.inputs; NAME.outputs is
written beside them ("/" in names becomes "-").
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import oracles
from .models import ALL
from .pruners import find

TESTS = Path(__file__).parents[1]


def file(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name.replace('/', '-')}.{kind}"


def in_fresh_process(folder: Path, pruner: str, names: Sequence[str]) -> None:
    """Run `main` in a process that has seen nothing of these models."""
    command = [sys.executable, "-m", "conformance.reload", str(folder), pruner, *names]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main(folder: Path, pruner: str, names: Sequence[str]) -> None:
    for name in names:
        model = find(pruner).load(file(folder, name, "model"), ALL[name].build).eval()
        inputs = torch.load(file(folder, name, "inputs"), weights_only=True)
        torch.save(oracles.outputs(model, inputs), file(folder, name, "outputs"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
