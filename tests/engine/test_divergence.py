"""A training that diverges stops, says so, and leaves its last good checkpoint."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.engine import TINY

from polarfast import cli
from polarfast.engine import trainer as training
from polarfast.engine.folder import Checkpoints
from polarfast.engine.launch import launch
from polarfast.engine.recipe import Recipe, to_yaml
from polarfast.errors import RunError

QUIET = Console(quiet=True)


def stage(recipe: Recipe, name: str, **changes: object) -> Recipe:
    return replace(recipe, **{name: replace(getattr(recipe, name), **changes)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "finetune"])
def test_a_loss_that_is_not_finite(tmp_path, name):
    folder = tmp_path / "run"
    diverging = stage(TINY, name, lr=1e6, warmup=0)
    with pytest.raises(RunError, match=rf"batch \d of 4.*--{name}.lr"):
        launch(diverging, folder, QUIET)
    assert not (folder / "slim.pt").exists()
    state = Checkpoints(folder).newest()
    if name == "finetune":
        assert state is not None and state["phase"] == "finetune"
    assert all(_finite(path) for path in (folder / "checkpoints").glob("*.pt"))


def _finite(path) -> bool:
    tensors: list[torch.Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            tensors.append(value)
        elif isinstance(value, dict):
            [collect(each) for each in value.values()]
        elif isinstance(value, (list, tuple)):
            [collect(each) for each in value]

    collect(torch.load(path, weights_only=True))
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6, 12])  # the first, one within an epoch, the very last
def test_weights_that_are_not_finite(tmp_path, monkeypatch, step):
    """Found before a checkpoint holds them, at the last step too, behind which no loss is taken."""
    real = training.Trainer._step

    def broken(self, shards):
        real(self, shards)
        if self.step + 1 == step:
            with torch.no_grad():
                next(iter(self.scales.values())).view(-1)[0] = float("nan")

    monkeypatch.setattr(training.Trainer, "_step", broken)
    with pytest.raises(RunError, match="sparsity training diverged.*no longer finite"):
        launch(TINY, tmp_path / "run", QUIET)
    files = list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert all(map(_finite, files)) and not (tmp_path / "run" / "dense.pt").exists()
    assert bool(files) == (step > 1)


@pytest.mark.slow
def test_the_command_line_ends_with_a_status(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(stage(TINY, "finetune", lr=1e6, warmup=0)))
    status = cli.main(["run", str(path), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert status == 1 and "fine-tuning diverged" in said and "--finetune.lr" in said
