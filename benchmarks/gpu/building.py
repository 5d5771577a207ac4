"""Stage a: the extension, built in place against the torch that is there; nothing is installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rows import Row

ROOT = Path(__file__).parents[2]


def build(device: str, folder: Path) -> Iterator[Row]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True)
    # In a process of its own: this one may have the extension of before.
    seen = "import torch, polarfast._C as c, polarfast; print(c.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", seen], cwd=ROOT, check=True, capture_output=True, text=True
    )
    yield {"table": "build", "row": "extension", "cells": {"file": Path(done.stdout.strip()).name}}
