"""The process of one stage: does its work and appends each row to the file named in ROWS.

ROWS=rows.jsonl python benchmarks/gpu/worker.py --device cuda agreement
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]

#: Work -> the module that holds a function of this name, (device, folder) -> rows. What it needs is
#: imported in its own process alone: the first of them builds the extension.
WORKS = {
    "build": "building",
    "agreement": "checks",
    "marked_tests": "checks",
    "loops": "checks",
    "replays": "checks",
    "timings": "timings",
    "trace": "timings",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for files besides the rows")
    arguments = parser.parse_args()
    work = getattr(importlib.import_module(WORKS[arguments.work]), arguments.work)
    failures = 0
    with open(os.environ["ROWS"], "a") as file:
        for row in work(arguments.device, arguments.folder):
            file.write(json.dumps(row) + "\n")
            file.flush()
            failures += "failed" in row
    print(f"{failures} failed" if failures else "done")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
