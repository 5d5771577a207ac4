"""Runs that are killed, for real and everywhere, end as if nothing had happened: to the bit."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.engine import (
    PATIENCE,
    TINY,
    Watcher,
    assert_same,
    finish,
    go_on,
    launched,
    outcome,
    start,
)

from polarfast.engine import stages as loop
from polarfast.engine.interrupts import Interrupted, StopSignals
from polarfast.engine.launch import find_state, progress
from polarfast.engine.recipe import Pruning, Recipe, Sparsity, to_yaml
from polarfast.engine.watching import Step

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish([start(launched, TINY, folder, {})]) == [0]
    return folder


def finished(folder: Path) -> bool:
    state = find_state(folder, TINY)
    return state is not None and state["phase"] == "done" and (folder / "results.json").exists()


def assert_tidy(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert len(list((folder / "checkpoints").glob("0*.pt"))) <= TINY.hardware.keep


@pytest.mark.slow
def test_the_tiny_run_does_prune(whole: Path) -> None:
    result = outcome(whole)
    assert result[".facts.cut"] > 0.05
    assert len({name for name in result if re.fullmatch(r"\.history\.\d\.epoch", name)}) == 5
    assert_tidy(whole)


def newest(folder: Path) -> int:
    return max((int(file.stem) for file in (folder / "checkpoints").glob("0*.pt")), default=0)


@pytest.mark.slow
def test_killed_at_random_moments(whole: Path, tmp_path: Path) -> None:
    """Some milliseconds after the start, or after a few more checkpoints, however fast all is."""
    folder, kills, chance = tmp_path / "run", 0, random.Random(0)
    while not finished(folder):
        process = start(launched, TINY, folder, {})
        aim = newest(folder) + (kills % 4 > 0) * chance.randint(1, 4)
        while newest(folder) < aim and process.is_alive():
            time.sleep(0.001)
        process.join(chance.uniform(0.0, 0.05))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert kills < 60
    assert kills >= 5
    assert_same(outcome(folder), outcome(whole))


def die_at_write(number: int, after: bool) -> None:
    """End this process, with nothing tidied up, at a file's move into its place, or after it."""
    replace_file, left = os.replace, [number]

    def replace_or_die(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            if after:
                replace_file(source, target)
            os._exit(9)
        replace_file(source, target)

    os.replace = replace_or_die


@pytest.mark.slow
def test_killed_between_any_two_writes(tmp_path: Path) -> None:
    """Each process dies at its second write (the first is recipe.yaml's), after it, or before the
    third; where that brings it no further than the one before, one write later."""
    stage = replace(TINY.train, epochs=1)
    recipe = replace(TINY, batch_size=48, train=stage, finetune=replace(TINY.finetune, epochs=1))
    folder, deaths, place, writes = tmp_path / "run", 0, None, 2
    while (now := progress(folder)) != "at its end":
        place, writes = now, 2 if now != place else writes + 1
        after = deaths % 2 == 0
        dies = partial(die_at_write, writes + (not after), after)
        assert finish([start(launched, recipe, folder, {}, dies)])[0] in (0, 9)
        deaths += 1
        assert deaths < 40
    assert deaths > 12  # 4 steps, and the files between and after the stages
    assert finish([start(launched, recipe, folder, {})]) == [0]
    assert_tidy(folder)
    go_on(recipe, tmp_path / "whole")
    assert_same(outcome(folder), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_real_command_stopped_by_signals(whole: Path, tmp_path: Path) -> None:
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(TINY), encoding="utf-8")
    command = [sys.executable, "-m", "polarfast", "run", str(recipe), "--out", str(folder)]
    waits: list[tuple[signal.Signals, Callable[[], bool]]] = [
        (signal.SIGTERM, lambda: any((folder / "checkpoints").glob("0*.pt"))),
        (signal.SIGINT, (folder / "pruned.pt").exists),
    ]
    for number, reached in waits:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not reached() and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(number)
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == 128 + number, output
        stopped = rf"Stopped by {number.name} (after step \d+ of|before) the phase '\w+'; run the "
        assert re.search(stopped + "same command again to go on", output), output
        assert "Traceback" not in output
    last = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert last.returncode == 0 and "Going on in" in last.stdout, last.stderr
    assert_same(outcome(folder), outcome(whole))


VARIANTS: dict[str, Recipe] = {
    "ema, accumulated, clipped": replace(TINY, ema=0.9, accumulate=2, clip=1.0),
    "bf16, smoothed, nesterov": replace(
        TINY, precision="bf16", label_smoothing=0.1, nesterov=True, decay_norms=False
    ),
    "fp16 with loss scaling": replace(TINY, precision="fp16"),
    "flops target": replace(TINY, sparsity=Sparsity(lam=0.1, regularizer="flops-target", cut=0.4)),
    "gates": replace(TINY, sparsity=replace(TINY.sparsity, gates="bn1", init=None)),
    "uniform width": replace(
        TINY,
        sparsity=Sparsity(lam=0.1, regularizer="none", init=None),
        pruning=Pruning(method="uniform", cut=0.5),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_within_epochs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal after steps 3, 4 (of 4 in an epoch) and 9 of each stage."""
    recipe = VARIANTS[name]
    monkeypatch.setattr(loop, "SHOW_SECONDS", 0.0)
    go_on(recipe, tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    stopped: list[tuple[str, int]] = []

    def stop(step: Step) -> None:
        if step.step in (3, 4, 9) and (step.stage, step.step) not in stopped:
            stopped.append((step.stage, step.step))
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "run"
    for _ in range(5):
        with pytest.raises(Interrupted, match="SIGTERM"):
            go_on(recipe, folder, [Watcher(at_step=stop)])
        assert progress(folder) is not None
    go_on(recipe, folder, [Watcher(at_step=stop)])
    assert len(stopped) == 5  # fine-tuning has 8 steps
    assert_same(outcome(folder), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_signal_while_pruning_stops_before_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polarfast.engine import run as running

    evaluate = running.evaluate

    def evaluate_and_signal(*arguments: Any) -> float:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(running, "evaluate", evaluate_and_signal)
    with pytest.raises(Interrupted):
        go_on(TINY, tmp_path)
    assert progress(tmp_path) == "before the phase 'finetune'"


def test_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_torn_newest_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    """As after a disk that lost what it had promised to keep."""
    folder = tmp_path / "run"
    go_on(TINY, folder, until="train")
    files = sorted((folder / "checkpoints").glob("0*.pt"))
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    go_on(TINY, folder)
    assert_same(outcome(folder), outcome(whole))


@pytest.mark.slow
def test_half_written_files_are_swept_away(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    left = [folder / ".dense.pt.abcd_123", folder / "checkpoints" / ".00000009.pt.zyxw9876"]
    for path in left:
        path.write_bytes(b"half")
    mine = folder / ".gitignore"
    mine.write_text("*\n")
    newest = max((folder / "checkpoints").glob("0*.pt"))
    newest.unlink()  # the state before the last one: there is something left to write
    go_on(TINY, folder)
    assert not any(path.exists() for path in left) and mine.exists()
    assert_same(outcome(folder), outcome(whole))
