"""The command line, as a user meets it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.engine import TINY, assert_same, outcome

from polarfast import cli
from polarfast.engine import launch as launching
from polarfast.engine.recipe import load_recipe, recipe_names, to_yaml

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


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_fits_a_screen(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for name in ("demo", "run", "train", "prune", "finetune", "search", "compare", "sweep", "info"):
        assert any(re.search(rf"\b{name}\b", line) for line in lines), name


@pytest.mark.parametrize(
    "command", ["demo", "run demo", "prune demo", "compare demo", "sweep demo"]
)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in recipe_names())


@pytest.mark.slow
def test_info_without_the_extra() -> None:
    result = run(code=WITHOUT_EXTRA.format(hidden=HIDDEN, arguments=["info"]))
    assert result.returncode == 0, result.stderr
    for name in ("polarfast", "torch", "threads", "SIMD level", "build flags", "triton", "GPU"):
        assert re.search(rf"^{name}", result.stdout, re.MULTILINE), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["prunee"], 2),
        (["run", "--help"], 0),
        (["search", "demo", "--help"], 0),
        (["compare", "demo", "--cutz", "3"], 2),
        (["run", "nowhere"], 1),
    ],
)
def test_help_and_wrong_options_do_not_wait_for_torch(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from polarfast.cli import main\n"
        f"try: status = main({arguments!r})\n"
        "except SystemExit as stop: status = stop.code\n"
        "sys.exit('torch' if 'torch' in sys.modules else status)"
    )
    result = run(code=code)
    assert result.returncode == status, result.stderr


def test_missing_extra_is_one_sentence() -> None:
    result = run(code=WITHOUT_EXTRA.format(hidden=["tyro", "sklearn"], arguments=["demo"]))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "tyro, sklearn" in result.stderr and "pip install 'polarfast[train]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prunee"], "no command 'prunee'"),
        (["RECIPE"], "no command 'RECIPE'"),
        (["--cut"], "no command '--cut'"),
        (["info", "--all"], "info: takes no options"),
        (["run"], "usage: polarfast run RECIPE"),
        (["run", "--dry-run"], "usage: polarfast run RECIPE"),
        (["demo", "--epochs", "3"], "--epochs"),
        (["demo", "--seed", "x"], "seed"),
        (["run", "demo", "--train.lamda", "3"], "--train.lamda"),
        (["run", "demo", "--sparsity.residual", "drop"], "residual"),
    ],
)
def test_wrong_usage_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 2 and shown.out == ""
    assert message in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--resume", "--out", "{folder}"], "nothing to resume in"),
        (["run", "nowhere", "--out", "{folder}"], "recipe 'nowhere': give a .yaml file or one of"),
        (["run", "gone.yaml", "--out", "{folder}"], "recipe 'gone.yaml': there is no such file"),
        (["run", "demo", "--train.lr", "0", "--out", "{folder}"], "lr=0.0: must be positive"),
        (["run", "demo", "--batch-size", "2000", "--out", "{folder}"], "batch_size=2000: larger"),
        (["run", "mnist", "--data.root", "{folder}/images", "--out", "{folder}"], "data.root="),
        (["prune", "demo", "--out", "{folder}"], "not ready for 'prune': 'train' comes first"),
    ],
)
def test_error_is_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    try:
        status = cli.main([part.format(folder=folder) for part in arguments])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status in (1, 2) and message in shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    assert not folder.exists()


def test_gpu_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda", "--out", str(tmp_path / "run")]) == 1
    assert "--hardware.device cpu" in capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe's file; figures are not drawn."""
    monkeypatch.setattr(launching, "LATENCY_SECONDS", 0.01)
    monkeypatch.setattr(launching, "draw", lambda run: None)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(TINY), encoding="utf-8")
    return path


@pytest.mark.slow
def test_stages_one_by_one_are_the_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(recipe), "--out", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "stages"
    for stage in ("train", "prune", "finetune"):
        capsys.readouterr()
        assert cli.main([stage, str(recipe), "--out", str(folder)]) == 0
    assert "fine-tuned" in capsys.readouterr().out  # the last one prints the table
    assert_same(outcome(folder), outcome(tmp_path / "whole"))


def test_other_settings_are_refused_by_name(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(recipe), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    before = sorted((tmp_path / "run").rglob("*"))
    changed = ["--seed", "3", "--sparsity.lam", "0.2", "--data.shift", "2", "--hardware.keep", "4"]
    assert cli.main([*command, *changed]) == 1
    error = capsys.readouterr().err
    assert "has other settings (data.shift, seed, sparsity.lam)" in error
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_options_become_settings(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [
        "--train.epochs",
        "1",
        "--train.warmup",
        "0",
        "--sparsity.lam",
        "3e-3",
        "--ema",
        "0.5",
    ]
    assert cli.main(["train", str(recipe), "--out", str(folder), *options]) == 0
    train = replace(TINY.train, epochs=1, warmup=0.0)
    expected = replace(TINY, train=train, sparsity=replace(TINY.sparsity, lam=3e-3), ema=0.5)
    assert load_recipe(folder / "recipe.yaml") == expected
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_finished_run_started_again_trains_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(recipe), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    before = outcome(tmp_path / "run")
    assert cli.main([*command, "--resume"]) == 0
    again = capsys.readouterr().out
    assert "accuracy, fine-tuned" in first and "accuracy, fine-tuned" in again
    assert "is finished" in again and "loss" in first and "loss" not in again
    assert_same(outcome(tmp_path / "run"), before)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["accuracy_dense"] == before[".facts.accuracy_dense"]
