"""Killed again and again, at moments drawn at random, every command ends as if it had not been."""

import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console
from support.engine import PATIENCE, TINY, assert_same, finish, flat, launched, outcome, start

from polarfast.engine import commands
from polarfast.engine.campaigns.trials import Trial, run_all
from polarfast.engine.launch import progress
from polarfast.engine.lock import locked

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
]

SHORT = dataclasses.replace(
    TINY,
    train=dataclasses.replace(TINY.train, epochs=2),
    finetune=dataclasses.replace(TINY.finetune, epochs=1),
)
MANY = 20  # kills in one folder, at most


# ------------------------------------------------- what is killed, each in a process of its own


def run(folder: Path) -> None:
    launched(TINY, folder, {})


def _speak(folder: Path) -> Console:
    return Console(file=open(f"{folder}.txt", "a", encoding="utf-8"), width=120)  # noqa: SIM115


def search(folder: Path) -> None:
    train = dataclasses.replace(TINY.train, epochs=4, schedule="constant")
    recipe = dataclasses.replace(TINY, train=train)
    options = commands.SearchOptions(
        recipe, folder, cut=0.4, tol=0.3, max_trials=6, window=1, spread=1.0
    )
    commands.search(options, _speak(folder))


def compare(folder: Path) -> None:
    options = commands.CompareOptions(
        SHORT, folder, methods=("polarization", "uniform"), cuts=(0.5,), seeds=1, jobs=2
    )
    commands.compare(options, _speak(folder))


def report(folder: Path) -> None:
    runs = (folder.parents[1] / "finished",)
    commands.report(commands.ReportOptions(runs, folder / "page.html"))


# -------------------------------------------------------------------- what came of it


def of_search(folder: Path) -> Any:
    return (folder / "search.jsonl").read_text(encoding="utf-8")


def of_compare(folder: Path) -> Any:
    every = {path.parent.name: outcome(path.parent) for path in folder.glob("*/results.json")}
    return flat(every)


def of_report(folder: Path) -> Any:
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    return (folder / "page.html").read_text(encoding="utf-8")


Program = tuple[Callable[[Path], None], Callable[[Path], Any]]
PROGRAMS: dict[str, Program] = {
    "run": (run, outcome),
    "search": (search, of_search),
    "compare": (compare, of_compare),
    "report": (report, of_report),
}


def begin(program: Callable[[Path], None], folder: Path) -> Any:
    return start(program, folder, daemon=program is not compare)


@pytest.mark.parametrize("name", PROGRAMS)
def test_killed(name: str, tmp_path: Path, tries: int, told: Callable[[str], None]) -> None:
    """So many kills in all, and as many folders as they take."""
    program, came = PROGRAMS[name]
    (tmp_path / "whole").mkdir()
    if name == "report":
        assert finish([start(run, tmp_path / "finished")]) == [0]
    whole = tmp_path / "whole" / name
    finish([start(time.sleep, 0)])  # the server that starts processes is there
    begun = time.monotonic()
    assert finish([begin(program, whole)]) == [0]
    takes, wanted = time.monotonic() - begun, came(whole)

    random, kills, folders, where = Random(name), max(3, tries // 10), 0, Counter[str]()
    while where.total() < kills:
        folder, folders = tmp_path / f"killed{folders}" / name, folders + 1
        folder.parent.mkdir()
        for attempt in range(MANY):
            process = begin(program, folder)
            # Later ones are given longer: an attempt must at times come further than the last.
            process.join(random.uniform(0, takes * (0.3 + attempt / MANY)))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            where[(name == "run" and progress(folder)) or name] += 1
            if where.total() >= kills:
                break
        if process.exitcode == -signal.SIGKILL:
            process = begin(program, folder)
        assert finish([process]) == [0]
        if isinstance(wanted, dict):
            assert_same(came(folder), wanted)
        else:
            assert came(folder) == wanted
    told(f"{name}: {where.total()} kills in {folders} folders; {dict(where)}")


def endless(folder: Path) -> None:
    train = dataclasses.replace(TINY.train, epochs=10_000)
    run_all([[Trial("one", dataclasses.replace(TINY, train=train))]], folder, 1, print)


def test_the_trials_of_a_killed_campaign_stop(tmp_path: Path) -> None:
    """They would hold their folders against the command that goes on."""
    campaign = start(endless, tmp_path, daemon=False)
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("one/checkpoints/0*.pt")):
        assert campaign.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    campaign.kill()
    campaign.join()
    with locked(tmp_path / "one", patience=PATIENCE):
        assert "stopped by SIGTERM" in (tmp_path / "one" / "log.txt").read_text(encoding="utf-8")
