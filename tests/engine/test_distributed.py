"""Training on several processes (gloo): the same as one that accumulates, and as interruptible."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import (
    PATIENCE,
    TINY,
    assert_same,
    close,
    finish,
    launched,
    of_ranks,
    on,
    outcome,
    run_ranks,
    start_ranks,
    trained,
)
from torch import Tensor

from polarfast.engine import models
from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.source import load
from polarfast.engine.folder import Checkpoints, load_checkpoint
from polarfast.engine.launch import find_state
from polarfast.engine.recipe import Recipe
from polarfast.engine.seeds import seed_at
from polarfast.engine.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="sends signals"),
]

#: 4 steps of 24 images in 12 steps: an agreement on stopping after step 8 only, the end of epoch 2.
#: At this rate no rounding (a third of three shards has some) turns a ReLU or a γ's side, on the
#: CPUs that this has run on.
RECIPE = replace(TINY, train=replace(TINY.train, epochs=2, lr=0.035))
#: One epoch of 16 steps: an agreement within it.
LONG = replace(TINY, batch_size=6, train=replace(TINY.train, epochs=1))


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    """What one process comes to that accumulates 2, 3 or 4 shards."""
    folder = tmp_path_factory.mktemp("alone")
    states = {}
    for shards in (2, 3, 4):
        run_ranks(1, replace(RECIPE, accumulate=shards), folder / str(shards), trained)
        states[shards] = of_ranks(folder / str(shards), 1)[0]
    return states


@pytest.mark.parametrize(
    ("count", "accumulate", "parallel"),
    [(2, 1, "ddp"), (3, 1, "ddp"), (2, 2, "ddp"), (2, 1, "fsdp"), (3, 1, "fsdp"), (2, 2, "fsdp")],
)
def test_processes_do_what_one_does(
    alone: dict[int, dict[str, Tensor]],
    tmp_path: Path,
    count: int,
    accumulate: int,
    parallel: Any,
) -> None:
    """BatchNorm normalizes a shard in either case; its running statistics are averaged."""
    recipe = replace(on(RECIPE, parallel=parallel), accumulate=accumulate)
    run_ranks(count, recipe, tmp_path / "run", trained)
    states = of_ranks(tmp_path / "run", count)
    for other in states[1:]:
        assert_same(states[0], other)
    assert close(parameters(states[0]), parameters(alone[count * accumulate]))
    gammas = torch.cat([v for k, v in states[0].items() if re.search(r"layer.*bn.*weight", k)])
    assert float(gammas.min()) < 0.4 and float(gammas.max()) <= 1.0  # pushed apart, and clamped


def test_statistics_are_the_mean_of_all_processes(tmp_path: Path) -> None:
    """After one step: a tenth of the mean over the shards of each shard's statistics."""
    recipe = replace(TINY, batch_size=99, train=replace(TINY.train, epochs=1, warmup=0.0))
    run_ranks(3, recipe, tmp_path / "run", trained)
    state = of_ranks(tmp_path / "run", 3)[0]

    data = load(recipe.data, torch.device("cpu"))
    plan = EpochPlan(seed_at(seed_at(recipe.seed, 0), 0), 99, shards=3, shard_count=3)
    torch.manual_seed(recipe.seed)
    model = models.build("resnet8", 10, 1)
    seen: list[Tensor] = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for images, _ in data.train(plan):
        model(images)
    means = torch.stack([out.mean((0, 2, 3)) for out in seen]).mean(0)
    variances = torch.stack([out.var((0, 2, 3)) for out in seen]).mean(0)
    assert torch.allclose(state["bn1.running_mean"], 0.1 * means, atol=1e-6)
    assert torch.allclose(state["bn1.running_var"], 0.9 + 0.1 * variances, atol=1e-6)


EMA = replace(LONG, ema=0.9, clip=1.0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes, the first of which got a signal after 5 steps of 16."""
    folders = {}
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path_factory.mktemp("stopped") / parallel
        run_ranks(2, on(EMA, parallel=parallel), folder, trained, 5)
        folders[parallel] = folder
    return folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """dense.pt of two processes' uninterrupted runs."""
    states = {}
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path_factory.mktemp("whole") / parallel
        run_ranks(2, on(EMA, parallel=parallel), folder, trained)
        states[parallel] = torch.load(folder / "dense.pt", weights_only=True)
    return states


def copy_of(folder: Path, to: Path) -> Path:
    """A copy of a stopped run's checkpoint, which is after step 8: the next agreement."""
    (to / "run").mkdir(parents=True)
    state = Checkpoints(folder).newest()
    assert state is not None and state["trainer"]["step"] == 8
    Checkpoints(to / "run").save({k: v for k, v in state.items() if k != "format"})
    return to / "run"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_and_resumed_to_the_bit(
    stopped: dict[str, Path], whole: dict[str, Any], tmp_path: Path, parallel: Any
) -> None:
    folder = copy_of(stopped[parallel], tmp_path)
    run_ranks(2, on(EMA, parallel=parallel), folder, trained)
    assert_same(torch.load(folder / "dense.pt", weights_only=True), whole[parallel])


def test_fsdp_and_ddp_end_alike(whole: dict[str, dict[str, Tensor]]) -> None:
    assert close(whole["ddp"], whole["fsdp"])


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        ("ddp", "fsdp", 2),
        ("fsdp", "ddp", 2),
        ("fsdp", "ddp", 1),
        ("ddp", "ddp", 1),
        ("fsdp", "fsdp", 1),
    ],
)
def test_resumed_in_another_form(
    stopped: dict[str, Path],
    whole: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    before: str,
    after: Any,
    count: int,
) -> None:
    """Two shards a step all along, on one process or on two."""
    folder = copy_of(stopped[before], tmp_path)
    recipe = replace(on(EMA, parallel=after), accumulate=2 // count)
    run_ranks(count, recipe, folder, trained)
    dense = torch.load(folder / "dense.pt", weights_only=True)
    # On one process the second one's statistics of 8 steps are missing.
    compare = parameters if count == 1 else dict
    assert close(compare(dense), compare(whole[before]))


def test_resumed_on_one_and_then_three(
    stopped: dict[str, Path], whole: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = copy_of(stopped["ddp"], tmp_path)
    run_ranks(1, replace(EMA, accumulate=2), folder, trained, 10)
    state = find_state(folder, EMA)
    assert state is not None and state["trainer"]["step"] == 10
    run_ranks(3, EMA, folder, trained)
    assert len(load_checkpoint(max((folder / "checkpoints").glob("0*.pt")))["history"]) == 1
    dense = torch.load(folder / "dense.pt", weights_only=True)
    other = whole["ddp"]
    assert all(torch.isfinite(value).all() for value in dense.values())
    assert not close(dense, other)  # three shards a step: BatchNorm sees others, as the log says


def test_a_batch_that_cannot_be_shared_out(tmp_path: Path) -> None:
    recipe = replace(TINY, batch_size=25)
    processes = start_ranks(2, launched, recipe, tmp_path / "run")
    assert finish(processes) == [1, 1]
    assert not (tmp_path / "run").exists()


def test_processes_that_see_different_checkpoints(stopped: dict[str, Path], tmp_path: Path) -> None:
    """As on two machines that share no file system."""
    mine, other = copy_of(stopped["ddp"], tmp_path), tmp_path / "empty"
    first, second = start_ranks(2, _seen_by, EMA, mine, other)
    assert finish([first, second]) == [3, 3]


def _seen_by(recipe: Recipe, folder: Path, environment: dict[str, str], other: Path) -> None:
    from polarfast.errors import ArgumentError

    try:
        launched(recipe, folder if environment["RANK"] == "0" else other, environment)
    except ArgumentError as error:
        raise SystemExit(3 if "share" in str(error) else 1) from error


def _failing(recipe: Recipe, folder: Path, environment: dict[str, str], at: int) -> None:
    step = Trainer._step

    def failing(self: Trainer, shards: Any) -> None:
        if self.step == at and self.workers.rank == 1:
            raise OSError("an image cannot be read")
        step(self, shards)

    Trainer._step = failing  # type: ignore[method-assign]
    launched(recipe, folder, environment)


def test_an_error_in_one_process_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    processes = start_ranks(2, _failing, TINY, tmp_path / "run", 5)
    assert finish(processes) == [1, 1]
    assert time.monotonic() - began < PATIENCE
    run_ranks(2, TINY, tmp_path / "run")  # and the run can go on
    run_ranks(2, TINY, tmp_path / "whole")
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
