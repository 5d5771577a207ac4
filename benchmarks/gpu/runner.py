"""Stages of a run, one process after another under a time-out, and the files of results.

Needs nothing but Python: what a stage imports, breaks or leaves hanging ends with its process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rows import Row


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        key: its letter. title: what it does.
        seconds: after which it is killed, with all that it started.
        command: arguments; the process appends rows to the file named in the variable ROWS.
        stops: no stage after it is run if it fails.
        skipped: why it is not run; empty where it is.
    """

    key: str
    title: str
    seconds: float
    command: Sequence[str]
    stops: bool = False
    skipped: str = ""


@dataclass
class Outcome:
    """What became of a stage: "passed", "failed", "timed out" or "skipped", and why."""

    key: str
    title: str
    status: str
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)


@dataclass
class Results:
    """Everything that is known so far, in two files that are always whole.

    Attributes:
        machine: what was measured where: name -> value.
        path: of both files, without .json and .md.
    """

    machine: Mapping[str, str]
    path: Path
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(outcome.status in ("failed", "timed out") for outcome in self.outcomes)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        data = {
            "machine": dict(self.machine),
            "stages": [asdict(outcome) for outcome in self.outcomes],
        }
        _replace(self.path.with_suffix(".json"), json.dumps(data, indent=1, ensure_ascii=False))
        _replace(self.path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        parts = [f"# {self.machine.get('device', 'unknown device')}"]
        parts.append(", ".join(f"{k} {v}" for k, v in self.machine.items() if k != "device"))
        parts.append(_table([_summary(outcome) for outcome in self.outcomes]))
        for outcome in self.outcomes:
            titles = dict.fromkeys(row["table"] for row in outcome.rows)
            for title in titles:
                rows = [row for row in outcome.rows if row["table"] == title]
                parts.append(f"## {outcome.key}: {title}")
                parts.append(_table([_cells(row) for row in rows]))
        return "\n\n".join(parts) + "\n"


def run_stages(
    stages: Sequence[Stage],
    results: Results,
    log: Path,
    environment: Mapping[str, str],
    announce: Callable[[str], None],
) -> None:
    """Run the stages in order; results are written after each of them."""
    for stage in stages:
        announce(f"{stage.key}: {stage.title} (at most {stage.seconds:g} s)")
        outcome = run_stage(stage, log, environment)
        results.add(outcome)
        announce(f"{outcome.key}: {outcome.status}, {outcome.seconds:.1f} s. {outcome.note}")
        for row in outcome.rows:
            if "failed" in row:
                announce(f"   failed: {row['row']}: {row['failed']}")
        if stage.stops and outcome.status in ("failed", "timed out"):
            announce(f"{stage.key} failed: nothing after it is run")
            return


def run_stage(stage: Stage, log: Path, environment: Mapping[str, str]) -> Outcome:
    """Run one stage; what it and its children print goes to the end of `log`."""
    outcome = Outcome(stage.key, stage.title, "skipped", note=stage.skipped)
    if stage.skipped:
        return outcome
    rows = log.with_suffix(f".{stage.key}.jsonl")
    rows.write_text("")
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {stage.key}: {stage.title}\n")
        file.flush()
        said = file.tell()
        code = _run(stage, file, {**environment, "ROWS": str(rows)})
    outcome.seconds = time.monotonic() - start
    outcome.rows = list(_read(rows))
    rows.unlink()
    failures = sum("failed" in row for row in outcome.rows)
    if code is None:
        outcome.status, outcome.note = "timed out", f"killed after {stage.seconds:g} s"
    elif code or failures:
        outcome.status, outcome.note = "failed", _last_line(log, said)
    else:
        outcome.status, outcome.note = "passed", _last_line(log, said)
    return outcome


def _run(stage: Stage, file: Any, environment: Mapping[str, str]) -> int | None:
    """The exit status; None where it was killed. No process of the stage is left."""
    process = subprocess.Popen(
        list(stage.command),
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        return process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path) -> Iterator[Row]:
    """Rows of a process that may have been killed while it wrote one."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _replace(path: Path, text: str) -> None:
    """Write a file that others see as it was or as it is, never in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)


# --- tables


def _summary(outcome: Outcome) -> dict[str, str]:
    return {
        "stage": f"{outcome.key}: {outcome.title}",
        "outcome": outcome.status,
        "seconds": f"{outcome.seconds:.1f}",
        "last line": outcome.note[:120],
    }


def _cells(row: Row) -> dict[str, str]:
    cells = {"": row["row"]} | {title: _text(value) for title, value in row["cells"].items()}
    return cells | ({"failed": row["failed"].partition("\n")[0][:200]} if "failed" in row else {})


def _text(value: Any) -> str:
    if isinstance(value, list):
        middle, low, high = map(_text, value)
        return f"{middle} ({low}–{high})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = [titles, ["---"] * len(titles)]
    lines += [[row.get(title, "").replace("|", "\\|") for title in titles] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
