"""A process that is stopped but lives does not hold the others for long, and is named."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console
from support.engine import PATIENCE, TINY, launched, start_ranks

from polarfast.engine import launch as launching
from polarfast.engine import pulse
from polarfast.engine.folder import Checkpoints
from polarfast.engine.interrupts import Interrupted
from polarfast.engine.recipe import Hardware

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="sends signals"),
]
HASTY = replace(
    TINY,
    train=replace(TINY.train, epochs=1000),
    hardware=Hardware(device="cpu", checkpoint_minutes=0.0, patience_minutes=0.2),
)


def quick(said: Path) -> None:
    pulse.BEAT = 0.2
    sys.stderr = open(f"{said}-{os.environ['RANK']}", "w", encoding="utf-8")


def until_two_checkpoints(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(Checkpoints(folder).numbered()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named(tmp_path: Path, stopped: int) -> None:
    folder = tmp_path / "run"
    processes = start_ranks(2, launched, HASTY, folder, partial(quick, tmp_path / "said"))
    try:
        until_two_checkpoints(folder)
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        processes[1 - stopped].join(PATIENCE)
        assert processes[1 - stopped].exitcode == 1
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = (tmp_path / f"said-{1 - stopped}").read_text(encoding="utf-8")
    assert f"process {stopped} has not been heard from" in said
    if stopped:  # the first one said so before
        shown = (tmp_path / "run-0.txt").read_text(encoding="utf-8")
        assert "the run ends after 12 s" in shown
    assert Checkpoints(folder).newest() is not None


def test_all_that_stood_still_go_on(tmp_path: Path) -> None:
    """A job that is suspended as a whole for longer than its patience."""
    folder = tmp_path / "run"
    hasty = replace(HASTY, hardware=replace(HASTY.hardware, patience_minutes=0.1))
    processes = start_ranks(2, launched, hasty, folder, partial(quick, tmp_path / "said"))
    try:
        until_two_checkpoints(folder)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(7 if number == signal.SIGSTOP else 2)
        assert all(process.is_alive() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("gone", [0, 1])
def test_whoever_ends_with_an_error_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, gone: int, failed: bool
) -> None:
    """A launcher other than torchrun, as srun, lets the others wait in their collective."""
    left: dict[int, str] = {}
    monkeypatch.setattr(pulse, "BEAT", 0.05)
    store = dist.HashStore()
    pulses = []
    for rank in range(3):
        pulses.append(pulse.Pulse(store, rank, 3, 60.0))
        vars(pulses[-1])["_leave"] = partial(left.setdefault, rank)
    try:
        pulses[gone].close(failed)
        deadline = time.monotonic() + (10.0 if failed else 1.0)
        while len(left) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        for each in pulses:
            each.close()
    others = {0, 1, 2} - {gone}
    assert set(left) == (others if failed else set())
    assert all(f"process {gone} ended with an error" in why for why in left.values())


@pytest.mark.parametrize("error", [None, Interrupted(signal.SIGTERM), OSError(28, "full")])
def test_a_run_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(launching.Workers, "close", lambda self, failed: said.append(failed))

    def ends(*args: Any, **kwargs: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(launching, "_check_order", ends)
    monkeypatch.setattr(launching, "_execute_and_show", ends)
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        launching.launch(TINY, tmp_path / "run", Console(quiet=True))
    assert said == [isinstance(error, OSError)]
