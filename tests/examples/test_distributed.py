"""The examples on several processes, started as a user starts them."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from support.examples import EXAMPLES

pytestmark = pytest.mark.slow


def torchrun(script: str, processes: int) -> str:
    """What a script prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started = subprocess.Popen(
        [*command, f"--nproc-per-node={processes}", str(EXAMPLES / script)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its processes can be ended with it
    )
    try:
        said, _ = started.communicate(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, said[-4000:]
    return said


@pytest.mark.parametrize(("script", "processes"), [("ddp_loop.py", 2), ("fsdp_loop.py", 2)])
def test_loop(script: str, processes: int) -> None:
    said = torchrun(script, processes)
    (accuracies,) = re.findall(r"accuracy: ([\d.]+) % before pruning, ([\d.]+) % right", said)
    (cut,) = re.findall(r"MACs cut: ([\d.]+) %", said)
    before, after = map(float, accuracies)
    assert before > 90 and abs(after - before) <= 1
    assert 10 < float(cut) < 95
