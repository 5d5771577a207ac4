"""What a run will cost, found out without running it: steps, memory, time."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import polarfast as pf

from .data.source import DataSource
from .distributed import Workers
from .recipe import Pruning, Recipe, to_yaml
from .run import Run
from .trainer import autocast

TIMED_STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """What the sparsity training of a recipe costs in each process.

    Attributes:
        params: count.
        state_bytes: weights, gradients, momentum, averages. activation_bytes: kept for one
            backward pass.
        images_per_second: measured on ``timed`` images a pass, augmentation and loading left out.
    """

    params: int
    state_bytes: int
    activation_bytes: int
    images_per_second: float
    timed: int

    def hours(self, recipe: Recipe, data: DataSource) -> float:
        """Time of both stages, if the slim network is as slow as the dense one."""
        epochs = recipe.train.epochs + recipe.finetune.epochs
        return epochs * data.train_size / self.images_per_second / 3600


def estimate(model: nn.Module, data: DataSource, recipe: Recipe, world: int = 1) -> Estimate:
    """Time a few steps on a part of a batch, and count what their backward passes keep."""
    shard = recipe.batch_size // (world * recipe.accumulate)
    # Large batches of large images would take minutes on a small machine: scale up a part.
    count = max(2, min(shard, 32 if data.image_shape[1] < 64 else 4))
    images = data.example(1).repeat(count, 1, 1, 1)
    labels = torch.zeros(count, dtype=torch.int64, device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    kept = _kept_bytes(model, images, labels, recipe.precision)
    seconds = min(
        _step(model, images, labels, optimizer, recipe.precision) for _ in range(TIMED_STEPS)
    )
    params = sum(param.numel() for param in model.parameters())
    return Estimate(
        params=params,
        state_bytes=_training_bytes(params, recipe, world),
        activation_bytes=kept * shard // count,
        images_per_second=world * count / seconds,
        timed=count,
    )


def _training_bytes(params: int, recipe: Recipe, world: int) -> int:
    """In float32: weights and gradients, and momentum and averaged weights where there are any."""
    copies = 2 + (recipe.momentum > 0) + (recipe.ema > 0)
    sharded = world if recipe.hardware.parallel == "fsdp" else 1
    return 4 * params * copies // sharded


def _kept_bytes(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> int:
    """Bytes that a forward pass keeps for the backward one, parameters left out."""
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with autocast(images.device, precision):
            loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return sum(kept.values())


def _step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    with autocast(images.device, precision):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def dry_run(recipe: Recipe, console: Console) -> None:
    """Print the resolved recipe, what may be pruned, and what the run will cost.

    Under torchrun every process counts, and the first one prints.
    """
    torch.set_num_threads(recipe.hardware.threads)
    workers = Workers(recipe.hardware)
    try:
        _dry_run(Run(recipe, Path(), workers), console if workers.first else Console(quiet=True))
    finally:
        workers.close()


def _dry_run(run: Run, console: Console) -> None:
    recipe, data = run.recipe, run.data
    model, scales = run.networks.fresh()
    if recipe.hardware.channels_last:
        model.to(memory_format=torch.channels_last)
    console.print(to_yaml(recipe), markup=False, highlight=False)
    run.networks.check_reach(model.eval(), scales)
    plan = run.networks.plan(model, scales, Pruning(method="none"))
    console.print(_model_table(model, scales, plan))
    cost = estimate(model.train(), data, recipe, run.workers.world)
    console.print(_cost_table(cost, run))
    console.print(
        f"Time and activations are scaled up from {cost.timed} images a pass on "
        f"{run.workers.device}; loading is not in them. Nothing was trained or written.",
        highlight=False,
    )


def _model_table(model: nn.Module, scales: pf.ScalingFactors, plan: pf.PruningPlan) -> Table:
    table = Table(title="Layers that may be pruned", title_justify="left")
    table.add_column("scaling factor")
    table.add_column("channels", justify="right")
    for name, gamma in scales.items():
        table.add_row(name, f"{gamma.numel():,}")
    table.add_section()
    left = len(scales.pinned)
    stay = "1 other stays" if left == 1 else f"{left} others stay"
    table.add_row(f"{len(scales)} layers ({stay})", f"{scales.numel():,}")
    macs = plan.macs_before / plan.inputs["shape"][0]
    table.caption = f"{macs / 1e6:,.2f} M MACs an image, {plan.params_before:,} parameters"
    return table


def _cost_table(cost: Estimate, run: Run) -> Table:
    recipe, data = run.recipe, run.data
    table = Table(title="What it costs", title_justify="left", show_header=False)
    stages = (("train", recipe.train), ("finetune", recipe.finetune))
    for name, stage in stages:
        steps = run.steps_per_epoch * stage.epochs
        table.add_row(f"{name}: steps", f"{stage.epochs} x {run.steps_per_epoch:,} = {steps:,}")
    table.add_row("images", f"{data.train_size:,} to train, {data.test_size:,} to test")
    table.add_row("weights, gradients, optimizer", f"{cost.state_bytes / 2**20:,.0f} MiB a process")
    table.add_row("activations", f"{cost.activation_bytes / 2**20:,.0f} MiB a process")
    table.add_row("speed", f"{cost.images_per_second:,.0f} images/s")
    hours = cost.hours(recipe, data)
    spelled = f"{hours:,.1f} h" if hours >= 1 else f"{math.ceil(60 * hours)} min"
    table.add_row("time", f"about {spelled}, both stages")
    return table
