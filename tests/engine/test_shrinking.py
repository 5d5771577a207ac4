"""A network that is made smaller while it trains: the same results, resumed to the bit."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine import (
    TINY,
    Watcher,
    assert_same,
    go_on,
    on,
    outcome,
    run_ranks,
)
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine import distributed
from polarfast.engine import stages as loop
from polarfast.engine.distributed import Workers
from polarfast.engine.interrupts import Interrupted
from polarfast.engine.launch import find_state
from polarfast.engine.recipe import Recipe, Sparsity, Stage
from polarfast.engine.run import Run
from polarfast.engine.shrinking import WORTH, Shrinking
from polarfast.engine.trainer import Trainer

SMALLER = replace(
    TINY,
    sparsity=Sparsity(lam=0.0, regularizer="flops-target", cut=0.6),
    train=Stage(epochs=10, lr=0.1),
    finetune=Stage(epochs=1, lr=0.02),
)
pytestmark = pytest.mark.filterwarnings("ignore:FlopsTarget:UserWarning")  # 40 steps are few
MESSAGE = "The network that trains is now its slim form"


def notes(watcher: Watcher) -> list[str]:
    return [text for kind, text in watcher.told if kind == "note"]


@torch.no_grad()
def halved(scales: pf.ScalingFactors, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gamma in scales.values():
        gamma[torch.rand(gamma.numel(), generator=generator) < 0.4] = 0


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    was = model.training
    out = model.eval()(images)
    model.train(was)
    return out


@pytest.mark.parametrize(
    "recipe",
    [
        SMALLER,
        replace(SMALLER, ema=0.5),
        replace(SMALLER, precision="bf16", decay_norms=False),
        on(replace(SMALLER, sparsity=replace(SMALLER.sparsity, residual="couple")), threads=1),
        on(SMALLER, channels_last=True),
        replace(SMALLER, sparsity=replace(SMALLER.sparsity, regularize="bn1", clamp="all")),
    ],
    ids=["plain", "ema", "bf16", "couple", "channels_last", "some-layers"],
)
def test_what_is_computed_stays(recipe: Recipe, tmp_path: Path) -> None:
    """Twice in a row, averages and optimizer along."""
    workers = Workers(recipe.hardware)
    run = Run(recipe, tmp_path, workers)
    model, scales = run.networks.fresh()
    regularizer = run.networks.regularizer(model, scales, 100)
    assert isinstance(regularizer, pf.FlopsTarget)
    told: list[str] = []
    shrinking = Shrinking(run.networks, model, scales, regularizer, told.append)
    model = distributed.prepare(model, recipe, workers)
    pattern = recipe.sparsity.regularize
    chosen = scales.select(pattern) if pattern else scales
    trainer = Trainer(model, run.data, recipe, recipe.train, 1, workers, chosen, regularizer)
    images = run.data.example(16)
    for turn in (1, 2):
        for _ in trainer.rest_of_epoch():
            pass
        left = shrinking.left
        shrinking.after_epoch(trainer)
        assert shrinking.left == left  # nothing is at 0 yet
        halved(chosen if shrinking.slim is None else shrinking.factors(), seed=turn)
        if trainer.average is not None:
            trainer.average.take()
        before, size = outputs(trainer.model, images), sum(p.numel() for p in model.parameters())
        with trainer.averaged():
            averaged = outputs(trainer.model, images)
        shrinking.after_epoch(trainer)
        assert len(told) == turn and MESSAGE in told[-1]
        assert shrinking.left < left - WORTH and trainer.model is shrinking.slim is not model
        assert sum(p.numel() for p in trainer.model.parameters()) < size
        torch.testing.assert_close(outputs(trainer.model, images), before, rtol=1e-3, atol=1e-4)
        with trainer.averaged():
            out = outputs(trainer.model, images)
        torch.testing.assert_close(out, averaged, rtol=1e-3, atol=1e-4)
        dense = outputs(shrinking.write_back(), images)
        torch.testing.assert_close(dense, before, rtol=1e-3, atol=1e-4)
        known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert known == {id(p) for p in trainer.model.parameters()}
        decayed = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        assert decayed == ([recipe.weight_decay] if recipe.decay_norms else [5e-4, 0.0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    watcher = Watcher()
    go_on(SMALLER, folder, [watcher])
    return folder, notes(watcher)


def test_fewer_macs_for_the_same_plan(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, told = whole
    assert sum(MESSAGE in text for text in told) >= 2
    computed = [epoch["computed"] for epoch in find_state(folder, SMALLER)["history"]]  # type: ignore[index]
    # Channels go from step 16 of 40 on, and what arrives in the last epoch stays for the plan.
    assert computed[0] == 1.0 and computed[-1] < 0.7
    assert all(later <= earlier for earlier, later in zip(computed, computed[1:], strict=False))
    kept_whole = replace(SMALLER, sparsity=replace(SMALLER.sparsity, shrink=False))
    go_on(kept_whole, tmp_path / "other")
    mine, other = outcome(folder), outcome(tmp_path / "other")
    shares = [name for name in mine if name.endswith(".cut")]
    assert len(shares) > 5
    assert all(abs(mine[name] - other[name]) < 0.05 for name in shares)
    assert all(v == 1.0 for name, v in other.items() if "computed" in name and ".10." not in name)


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_killed_and_resumed_to_the_bit(
    ema: float, whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SHOW_SECONDS", 0.0)  # told of every step
    recipe, expected = replace(SMALLER, ema=ema), whole[0]
    if ema:
        expected = tmp_path / "whole"
        watcher = Watcher()
        go_on(recipe, expected, [watcher])
        assert sum(MESSAGE in text for text in notes(watcher)) >= 1
    for stops in (range(2, 40, 5), (20, 28)):
        folder = tmp_path / f"run{len(stops)}"
        for stop in stops:
            watcher = Watcher(
                lambda step, stop=stop: step.step == stop and signal.raise_signal(signal.SIGTERM)
            )
            with pytest.raises(Interrupted):
                go_on(recipe, folder, [watcher])
        go_on(recipe, folder)
        assert_same(outcome(folder), outcome(expected))


def test_a_teacher_is_there_again_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SHOW_SECONDS", 0.0)
    recipe = replace(SMALLER, finetune=Stage(epochs=2, lr=0.02, distill=0.5))
    go_on(recipe, tmp_path / "whole")
    watcher = Watcher(
        lambda step: (
            step.stage == "fine-tuning" and step.step == 3 and signal.raise_signal(signal.SIGTERM)
        )
    )
    with pytest.raises(Interrupted):
        go_on(recipe, tmp_path / "run", [watcher])
    go_on(recipe, tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    go_on(replace(recipe, finetune=Stage(epochs=2, lr=0.02)), tmp_path / "without")
    mine, other = outcome(tmp_path / "run"), outcome(tmp_path / "without")
    assert not torch.equal(mine[".slim.tensors.fc.weight"], other[".slim.tensors.fc.weight"])


@pytest.mark.slow
def test_processes_shrink_alike(tmp_path: Path) -> None:
    run_ranks(2, SMALLER, tmp_path / "two")
    go_on(replace(SMALLER, accumulate=2), tmp_path / "one")
    mine, other = outcome(tmp_path / "two"), outcome(tmp_path / "one")
    computed = [name for name in mine if name.endswith("computed")]
    assert min(mine[name] for name in computed) < 0.7
    assert all(mine[name] == other[name] for name in computed[:4])


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    watcher = Watcher()
    recipe = on(replace(SMALLER, train=Stage(epochs=5, lr=0.1)), compile=True)
    run = go_on(recipe, tmp_path, [watcher], until="train")
    assert any(MESSAGE in text for text in notes(watcher))
    assert run.facts["accuracy_dense"] > 10


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (
            replace(
                SMALLER,
                sparsity=replace(SMALLER.sparsity, gates="bn", residual="keep"),
                train=Stage(epochs=1, lr=0.1),
            ),
            "its gates",
        ),
    ],
)
def test_it_says_where_it_does_not(recipe: Recipe, why: str, tmp_path: Path) -> None:
    watcher = Watcher()
    go_on(recipe, tmp_path, [watcher], until="train")
    assert any("not made smaller" in text and why in text for text in notes(watcher))
