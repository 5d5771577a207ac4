"""Tiny recipes, what their runs leave behind, and runs in processes of their own.

Processes are forked from a server that has imported everything already: they can be killed by the
dozen.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from polarfast.engine import distributed
from polarfast.engine import launch as launching
from polarfast.engine import stages as loop
from polarfast.engine.data.settings import Data
from polarfast.engine.distributed import Workers
from polarfast.engine.interrupts import Interrupted
from polarfast.engine.launch import find_state
from polarfast.engine.recipe import Hardware, Recipe, Sparsity, Stage
from polarfast.engine.run import Run
from polarfast.engine.watching import Epoch, Observer, Step

#: 4 steps an epoch, a checkpoint after each, and γ that move far enough to be pruned.
TINY = Recipe(
    data=Data("digits", augment="shift", shift=1, train_images=100, test_images=60),
    model="resnet8",
    sparsity=Sparsity(lam=0.1, t=1.2),
    train=Stage(epochs=3, lr=0.1, warmup=0.5),
    finetune=Stage(epochs=2, lr=0.02),
    batch_size=24,
    hardware=Hardware(device="cpu", deterministic=True, checkpoint_minutes=0.0),
)
MEASURED = ("seconds", "images_per_second")  # times, which no two runs share
#: What a run imports on its way.
HEAVY = (
    *("sklearn.datasets", "matplotlib.figure", "torch.utils.tensorboard", "torch._inductor"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"),
    *("torch.utils.flop_counter", "rich.progress", "matplotlib.backends.backend_agg"),
)
PATIENCE = 120  # seconds until a process is given up


class Watcher:
    """An observer that keeps what it is told, and can do something at a step or an epoch."""

    def __init__(
        self,
        at_step: Callable[[Step], None] | None = None,
        at_epoch: Callable[[Epoch], None] | None = None,
    ) -> None:
        self.at_step, self.at_epoch = at_step, at_epoch
        self.told: list[tuple[str, Any]] = []

    def stage_started(self, stage: str, done: int, steps: int, epochs: int) -> None:
        self.told.append(("stage", (stage, done, steps, epochs)))

    def step_finished(self, step: Step) -> None:
        self.told.append(("step", step))
        if self.at_step is not None:
            self.at_step(step)

    def epoch_finished(self, epoch: Epoch) -> None:
        self.told.append(("epoch", epoch))
        if self.at_epoch is not None:
            self.at_epoch(epoch)

    def note(self, text: str) -> None:
        self.told.append(("note", text))

    def close(self) -> None:
        self.told.append(("close", None))


def go_on(
    recipe: Recipe, folder: Path, observers: Sequence[Observer] = (), until: str = "finetune"
) -> Run:
    """Run a recipe in this process, from where it is in ``folder``."""
    run = Run(recipe, folder, Workers(recipe.hardware), find_state(folder, recipe))
    run.observers = observers
    run.execute(until)
    return run


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict, by dotted names."""
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: value}
    merged: dict[str, Any] = {}
    for key, part in parts:
        merged |= flat(part, f"{name}.{key}")
    return merged


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run came to, times apart."""
    contents = {
        name: torch.load(folder / f"{name}.pt", weights_only=True)
        for name in ("dense", "pruned", "slim", "gammas")
        if (folder / f"{name}.pt").exists()
    }
    newest = max((folder / "checkpoints").glob("0*.pt"))
    state = torch.load(newest, weights_only=True)
    history = [
        {key: value for key, value in epoch.items() if key not in MEASURED}
        for epoch in state["history"]
    ]
    facts = {key: value for key, value in state["facts"].items() if key not in MEASURED}
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return flat({**contents, "history": history, "facts": facts, "plan": plan})


def assert_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """To the bit."""
    assert first.keys() == second.keys()
    different = [
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        )
    ]
    assert not different, different


def close(first: dict[str, Tensor], second: dict[str, Tensor], limit: float = 1e-5) -> bool:
    """Whether no two numbers of the same name are further apart."""
    assert first.keys() == second.keys()
    return max(float((first[k] - second[k]).abs().max()) for k in first) < limit


# --------------------------------------------------------------------- processes of their own


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.engine", *HEAVY])
    return context


def start(target: Callable[..., None], *arguments: Any, daemon: bool = True) -> Any:
    """A process of its own; a daemon starts none itself, and ends with the tests."""
    process = _server().Process(target=target, args=arguments, daemon=daemon)
    process.start()
    return process


def launched(
    recipe: Recipe, folder: Path, environment: Mapping[str, str], before: Any = None
) -> None:
    """In a process of its own: what the command line does; prints to FOLDER-rank.txt.

    Args:
        before: called first, with nothing.
    """
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    launching.LATENCY_SECONDS = 0.01
    launching.draw = lambda run: None  # the slowest part of so small a run
    loop.SHOW_SECONDS = 0.0
    if before is not None:
        before()
    with open(f"{folder}-{rank}.txt", "a", encoding="utf-8") as screen:
        launching.launch(recipe, folder, Console(file=screen, width=120))


def start_ranks(
    count: int, target: Callable[..., None], recipe: Recipe, folder: Path, *more: Any
) -> list[Any]:
    """Several processes, with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(target, recipe, folder, rank, *more) for rank in ranks]


def finish(processes: Sequence[Any]) -> list[int | None]:
    """Wait for them all; exit statuses. Whoever is still there after ``PATIENCE`` is killed."""
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return codes


def run_ranks(
    count: int, recipe: Recipe, folder: Path, target: Callable[..., None] = launched, *more: Any
) -> None:
    """Several processes that all end well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    assert finish(start_ranks(count, target, recipe, folder, *more)) == [0] * count


def trained(recipe: Recipe, folder: Path, environment: Mapping[str, str], steps: int = 0) -> None:
    """In a process of its own: train, then save this process's whole model as FOLDER-rank.pt.

    Args:
        steps: stop after so many, by a signal to this process; 0 trains to the end.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    models: list[torch.nn.Module] = []
    prepare = distributed.prepare

    def prepare_and_note(*arguments: Any) -> torch.nn.Module:
        models.append(prepare(*arguments))
        return models[0]

    distributed.prepare = prepare_and_note
    workers = Workers(recipe.hardware)
    run = Run(recipe, folder, workers, find_state(folder, recipe))
    workers.wait()
    loop.SHOW_SECONDS = 0.0
    if steps:
        run.observers = [Watcher(at_step=lambda step: _stop_at(step, steps))]
    try:
        run.execute("train")
    except Interrupted:
        assert steps
    state = {name: _whole(value) for name, value in models[0].state_dict().items()}
    torch.save(state, f"{folder}-{workers.rank}.pt")
    workers.close()


def _stop_at(step: Step, steps: int) -> None:
    if step.step == steps:
        signal.raise_signal(signal.SIGTERM)


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def of_ranks(folder: Path, count: int) -> list[dict[str, Tensor]]:
    """What :func:`trained` saved."""
    return [torch.load(f"{folder}-{rank}.pt", weights_only=True) for rank in range(count)]


def on(recipe: Recipe, **hardware: Any) -> Recipe:
    """The recipe on other hardware settings."""
    return replace(recipe, hardware=replace(recipe.hardware, **hardware))
