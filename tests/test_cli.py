"""The command line, as a user meets it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polarfast import cli
from polarfast.errors import ArgumentError

COMMAND = [sys.executable, "-m", "polarfast"]
# Refuses to import what the extra [train] brings, as if it were not installed.
WITHOUT_EXTRA = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n.split(".")[0] in {hidden!r} else found(n, p)
from polarfast.cli import main
sys.exit(main({arguments!r}))
"""
HIDDEN = ["tyro", "rich", "yaml", "sklearn", "matplotlib", "tensorboard", "torchvision", "triton"]


def run(*arguments: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, *arguments] if code is None else [sys.executable, "-c", code]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert any("demo" in line for line in lines) and any("info" in line for line in lines)


def test_info_without_the_extra() -> None:
    result = run(code=WITHOUT_EXTRA.format(hidden=HIDDEN, arguments=["info"]))
    assert result.returncode == 0, result.stderr
    for name in ("polarfast", "torch", "threads", "SIMD level", "build flags", "triton", "GPU"):
        assert re.search(rf"^{name}", result.stdout, re.MULTILINE), name


def test_missing_extra_is_one_sentence() -> None:
    result = run(code=WITHOUT_EXTRA.format(hidden=["tyro", "sklearn"], arguments=["demo"]))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "tyro, sklearn" in result.stderr and "pip install 'polarfast[train]'" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["demo", "--epochs", "3"], ["prune"], ["demo", "--seed", "x"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_error_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--resume", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("polarfast: nothing to resume in") and "Traceback" not in error


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArgumentError, match="--device cpu"):
        cli.demo(device="cuda")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_run_that_the_same_command_goes_on_with(tmp_path: Path) -> None:
    """The real thing: SIGINT to the real command, twice."""
    command = [*COMMAND, "demo", "--quick", "--out", str(tmp_path / "run")]
    log = tmp_path / "run" / "metrics.jsonl"
    outputs, done = [], 0
    for _ in range(2):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 100
        while not (log.exists() and len(log.read_text().splitlines()) > done):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in output
        interrupted = re.search(r"Interrupted after epoch (\d+) of sparsity training", output)
        assert interrupted is not None, output
        assert int(interrupted[1]) > done
        done = int(interrupted[1])
        outputs.append(output)
    assert "Resuming" not in outputs[0] and "Resuming" in outputs[1]
