"""Runs under torchrun: stopped, resumed, restarted."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine import (
    PATIENCE,
    TINY,
    assert_same,
    close,
    finish,
    launched,
    on,
    outcome,
    run_ranks,
    start,
)

from polarfast.engine.launch import find_state
from polarfast.engine.recipe import Recipe, to_yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="sends signals"),
]

LONG_PATIENCE = 2 * PATIENCE  # two starts of everything


@contextmanager
def torchrun(recipe: Recipe, folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """The real thing, in a process group that is gone afterwards whatever happens."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "tiny.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
            *(*options, "-m", "polarfast", "run", str(file), "--out", str(folder)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        # Workers have sessions of their own, and outlive a torchrun that is killed.
        for one in [process.pid, *workers_of(process)]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()


def until_checkpoint(folder: Path, number: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(int(f.stem) >= number for f in (folder / "checkpoints").glob("0*.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


#: Fine-tuning is long, so that signals meet it.
PATIENT = replace(TINY, finetune=replace(TINY.finetune, epochs=20))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for workers in /proc")
def test_torchrun_stopped_resumed_and_restarted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with torchrun(PATIENT, folder) as process:
        until_checkpoint(folder, 3)
        process.terminate()
        output, errors = process.communicate(timeout=LONG_PATIENCE)
    assert process.returncode != 0
    assert output.count("resnet8 on digits") == 1 and "2 processes" in output
    assert len(re.findall("Stopped by SIGTERM .*; run the same command again", output)) == 1
    assert find_state(folder, PATIENT) is not None

    # A worker that is killed takes the others with it; torchrun starts all of them again. Once more
    # where gloo's own threads bring one down on a busy machine (std::terminate, not our code).
    with torchrun(PATIENT, folder, "--max-restarts=3") as process:
        until_checkpoint(folder, 10)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=LONG_PATIENCE)
    assert process.returncode == 0, errors
    assert output.count("Going on in") >= 2
    assert output.count("resnet8 on digits, polarization pruning") == 1
    assert (folder / "results.txt").exists()

    run_ranks(2, PATIENT, tmp_path / "whole")
    assert_same(outcome(folder), outcome(tmp_path / "whole"))


def test_one_process_under_torchrun_is_one_process(tmp_path: Path) -> None:
    run_ranks(1, on(TINY, parallel="fsdp"), tmp_path / "sharded")
    assert finish([start(launched, TINY, tmp_path / "alone", {})]) == [0]
    first, second = (
        torch.load(tmp_path / name / "dense.pt", weights_only=True) for name in ("sharded", "alone")
    )
    assert close(first, second)
