"""The steps of a stage: :class:`Trainer`."""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import polarfast as pf

from ..errors import ArgumentError
from . import distributed
from .data.plan import EpochPlan
from .data.source import DataSource
from .distributed import Workers
from .recipe import Recipe, Stage
from .seeds import seed_at

_log = logging.getLogger(__name__)

# Of evaluation: at most so many images at once, and so many pixels over all channels (56 images of
# ImageNet's size).
LARGEST_BATCH, BATCH_PIXELS = 500, 2**23
# Of float16's gradients: they begin at 2^16 and are halved at each step that is skipped.
SMALLEST_SCALE = 2.0**-14


class Trainer:
    """Trains a model for one stage with SGD; with scaling factors, through ``pf.step``.

    A step's batch is cut into ``world x accumulate`` shards. What a shard holds, and the random
    numbers drawn for it, depend on its number alone: N processes, and one that accumulates N
    shards, do the same work.

    Args:
        model: prepared by ``distributed.prepare``.
        stage: epochs and learning rates. seed: of this stage.
        scales, regularizer: both for sparsity training, neither for plain training.
        teacher: whose outputs the model follows, as far as ``stage.distill`` says; in eval mode.

    Attributes:
        step: optimizer steps done. loss: sum of the losses since the epoch began, of this process.

    Raises:
        ArgumentError: the batch does not fit the training set, or cannot be shared out evenly.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataSource,
        recipe: Recipe,
        stage: Stage,
        seed: int,
        workers: Workers,
        scales: pf.ScalingFactors | None = None,
        regularizer: pf.Regularizer | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.teacher = teacher
        self.model, self.data, self.recipe, self.stage = model, data, recipe, stage
        self.seed, self.workers = seed, workers
        self.scales, self.regularizer = scales, regularizer
        self.steps_per_epoch = steps_per_epoch(data, recipe, workers)
        self.optimizer = torch.optim.SGD(
            _groups(model, recipe),
            lr=stage.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        fp16 = recipe.precision == "fp16"
        self.scaler = torch.amp.GradScaler(workers.device.type, enabled=fp16)
        self.average = Average(model, recipe.ema) if recipe.ema else None
        self._wrapped = distributed.wrap(model, recipe, workers)
        self.step = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=workers.device)

    def replace(
        self, model: nn.Module, scales: pf.ScalingFactors, averages: nn.Module | None
    ) -> None:
        """Go on with another network, whose parameters the optimizer has already.

        Args:
            model: prepared. averages: built alike, with the averaged weights; None: there are none.
        """
        self.model, self.scales = model, scales
        if averages is not None:
            self.average = Average(model, self.recipe.ema, averages)
        self._wrapped = distributed.wrap(model, self.recipe, self.workers)

    @property
    def epoch(self) -> int:
        """How many epochs of the stage are done."""
        return self.step // self.steps_per_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.steps_per_epoch * self.stage.epochs

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return learning_rate(self.stage, max(self.step - 1, 0), self.steps_per_epoch)

    def rest_of_epoch(self) -> Iterator[None]:
        """Train to the end of the epoch that was begun or comes next; yields after each step."""
        count = self.recipe.accumulate
        done = self.step % self.steps_per_epoch
        if done == 0:
            self.loss.zero_()
        plan = EpochPlan(
            seed=seed_at(self.seed, self.epoch),
            batch_size=self.recipe.batch_size,
            shards=self.workers.world * count,
            first_shard=self.workers.rank * count,
            shard_count=count,
            start_step=done,
        )
        self.model.train()
        shards = self.data.train(plan)
        for _ in range(done, self.steps_per_epoch):
            self._step(islice(shards, count))
            self.step += 1
            yield
        self._share_statistics()

    def mean_loss(self) -> float:
        """Mean loss of the epoch's steps so far, regularizer not included."""
        done = (self.step - 1) % self.steps_per_epoch + 1
        return float(self.workers.total(self.loss)) / (done * self.workers.world)

    def diverged(self) -> bool:
        """Whether a loss of this epoch was not finite; in float16, whose scaler skips such steps,
        whether it has skipped a great many in a row.
        """
        if self.scaler.is_enabled():
            return self.scaler.get_scale() < SMALLEST_SCALE
        return not math.isfinite(float(self.loss))

    def broken(self) -> str | None:
        """The first parameter, or statistic of a BatchNorm, that is not finite."""
        tensors = dict(self.model.named_parameters())
        for name, buffer in self.model.named_buffers():
            if name.endswith(("running_mean", "running_var")):  # masks may well be infinite
                tensors[name] = buffer  # type: ignore[assignment]
        finite = [_local(tensor).isfinite().all() for tensor in tensors.values()]
        good = torch.stack(finite).tolist()
        return next((name for name, fine in zip(tensors, good, strict=True) if not fine), None)

    def accuracy(self) -> float:
        """Of the test images, percent, of the averaged weights if there are any."""
        with self.averaged():
            right = evaluate(self.model, self.data, self.workers, self.recipe.precision)
            distributed.settle(self.model)  # else the parameters stay what they are in this block
        return right

    def averaged(self) -> AbstractContextManager[None]:
        """Inside this block the model holds the weights that the stage would result in."""
        return self.average.in_place() if self.average else nullcontext()

    def _step(self, shards: Iterator[tuple[Tensor, Tensor]]) -> None:
        count = self.recipe.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.stage, self.step, self.steps_per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (images, labels) in enumerate(shards):
            torch.manual_seed(seed_at(self.seed, self.step, self.workers.rank * count + index))
            with self._joint(last=index == count - 1):
                with autocast(self.workers.device, self.recipe.precision):
                    loss = self._loss(images, labels) / count
                self.scaler.scale(loss).backward()
            self.loss += loss.detach()
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        if self.scales is not None and self.regularizer is not None:
            pf.step(self.optimizer, self.scales, self.regularizer, scaler=self.scaler)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of the labels and, where there is a teacher, of its outputs: the weighted mean."""
        logits = self._wrapped(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = self.teacher(images)
        weight, temperature = self.stage.distill, self.stage.temperature
        student, wanted = (each.float() / temperature for each in (logits, target))
        apart = F.kl_div(
            student.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
        # Times T², so that its gradients are as large at any temperature.
        return (1 - weight) * loss + weight * temperature**2 * apart

    def _joint(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged once a step, in its last backward pass."""
        if last or self.workers.world == 1:
            return nullcontext()
        if self.recipe.hardware.parallel == "fsdp":
            return _unsynchronized(self.model)
        return self._wrapped.no_sync()  # type: ignore[operator]

    @torch.no_grad()
    def _share_statistics(self) -> None:
        """Every process goes on with the mean of all processes' BatchNorm statistics."""
        if self.workers.world == 1:
            return
        for buffer in filter(Tensor.is_floating_point, self._buffers()):
            buffer.copy_(self.workers.total(buffer) / self.workers.world)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the stage depends on. Every process must ask, at the same step."""
        averages = None
        if self.average:
            with self.averaged():
                averages = distributed.model_state(self.model, self.recipe)
                averages = {name: tensor.clone() for name, tensor in averages.items()}
        return {
            "model": distributed.model_state(self.model, self.recipe),
            "optimizer": distributed.optimizer_state(self.model, self.optimizer, self.recipe),
            "scaler": self.scaler.state_dict(),
            "average": averages,
            "regularizer": self.regularizer.state_dict() if self.regularizer else {},
            "step": self.step,
            "shards": self.workers.world * self.recipe.accumulate,
            "loss": self.workers.gather(self.loss.cpu()),
            "buffers": self.workers.gather([buffer.cpu() for buffer in self._buffers()]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, on as many processes or on another number."""
        if self.average:
            distributed.load_model_state(self.model, state["average"], self.recipe)
            self.average.take()
        distributed.load_model_state(self.model, state["model"], self.recipe)
        distributed.load_optimizer_state(
            self.model, self.optimizer, state["optimizer"], self.recipe
        )
        self.scaler.load_state_dict(state["scaler"])
        if self.regularizer:
            self.regularizer.load_state_dict(state["regularizer"])
        self.step = state["step"]
        shards = self.workers.world * self.recipe.accumulate
        if shards != state["shards"] and self.workers.first:
            _log.warning(
                "batches are cut into %d parts from here on, %d before: BatchNorm sees other parts,"
                " and results are no longer those of an uninterrupted run",
                *(shards, state["shards"]),
            )
        if len(state["loss"]) != self.workers.world:
            # Statistics are then the first process's, up to the end of this epoch.
            self.loss.copy_(torch.stack(state["loss"]).mean())
            return
        self.loss.copy_(state["loss"][self.workers.rank])
        own = state["buffers"][self.workers.rank]
        for buffer, value in zip(self._buffers(), own, strict=True):
            buffer.copy_(value)

    def _buffers(self) -> list[Tensor]:
        """What differs between the processes within an epoch: BatchNorm's statistics."""
        return [*self.model.buffers(), *(self.average.buffers() if self.average else ())]


class _unsynchronized(AbstractContextManager[None]):
    """FSDP2's counterpart of ``no_sync``."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def __enter__(self) -> None:
        self._model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self._model.set_requires_gradient_sync(True)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    params = [param for param in model.parameters() if param.requires_grad]
    if recipe.decay_norms:
        return [{"params": params}]
    return [
        {"params": [param for param in params if param.dim() > 1]},
        {"params": [param for param in params if param.dim() <= 1], "weight_decay": 0.0},
    ]


def steps_per_epoch(data: DataSource, recipe: Recipe, workers: Workers) -> int:
    """Optimizer steps of an epoch; the images that fill no batch are left out.

    Raises:
        ArgumentError: the batch does not fit the training set, or cannot be shared out evenly.
    """
    shards = workers.world * recipe.accumulate
    if recipe.batch_size % shards:
        raise ArgumentError(
            f"batch_size={recipe.batch_size}: cannot be shared out evenly over {workers.world} "
            f"processes x {recipe.accumulate} passes (accumulate)"
        )
    steps = data.train_size // recipe.batch_size
    if steps == 0:
        raise ArgumentError(
            f"batch_size={recipe.batch_size}: larger than the {data.train_size} training images"
        )
    return steps


def learning_rate(stage: Stage, step: int, steps_per_epoch: int) -> float:
    """The rate of step number ``step`` (from 0) of a stage."""
    steps = steps_per_epoch * stage.epochs
    warmup = round(stage.warmup * steps_per_epoch)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    if stage.schedule == "step":
        begun = [epoch for epoch in stage.rates if epoch * steps_per_epoch <= step]
        return stage.rates[max(begun)] if begun else stage.lr
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Average:
    """The moving average of all floating-point parameters and buffers of a model.

    Unlike ``torch.optim.swa_utils.AveragedModel`` it copies no module, which FSDP2 does not allow.

    Args:
        model: whose tensors are followed; they may be DTensors.
        decay: weight of the past in each update.
        start: a model built alike, that holds the averages so far; by default they begin here.
    """

    def __init__(self, model: nn.Module, decay: float, start: nn.Module | None = None) -> None:
        self._model = model
        self._update = get_ema_multi_avg_fn(decay)
        self.tensors = [tensor.detach().clone() for tensor in _floating(start or model)]

    def buffers(self) -> list[Tensor]:
        """The averages of the buffers."""
        count = sum(buffer.is_floating_point() for buffer in self._model.buffers())
        return self.tensors[len(self.tensors) - count :]

    def take(self) -> None:
        """Make the model's present values the averages."""
        _copy(self.tensors, self._current())

    def _current(self) -> list[Tensor]:
        return _floating(self._model)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is now."""
        self._update(self.tensors, self._current(), 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the averages inside the block, and its own values again after it."""
        current = self._current()
        own = [tensor.detach().clone() for tensor in current]
        _copy(current, self.tensors)
        try:
            yield
        finally:
            _copy(current, own)


def _floating(model: nn.Module) -> list[Tensor]:
    every = [*model.parameters(), *model.buffers()]
    return [_local(tensor) for tensor in every if tensor.is_floating_point()]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: DataSource, workers: Workers, precision: str = "fp32"
) -> float:
    """Share of the test images that the model, in eval mode, classifies rightly, in percent.

    Every process takes its share of the images, and as many forward passes as the others, since
    a sharded model's forward pass is a joint one.
    """
    was_training = model.training
    model.eval()
    # Bad images that are skipped while streaming are missing from both.
    right, seen = torch.zeros(2, dtype=torch.int64, device=workers.device)
    share = -(-data.test_size // workers.world)
    batch = min(LARGEST_BATCH, max(1, BATCH_PIXELS // math.prod(data.image_shape)))
    passes = -(-share // batch)
    with autocast(workers.device, precision):
        for images, labels in data.test(batch, workers.rank, workers.world):
            right += (model(images).argmax(1) == labels).sum()
            seen += len(labels)
            passes -= 1
        for _ in range(passes):
            model(data.example())
    model.train(was_training)
    right, seen = workers.total(torch.stack((right, seen)))
    return 100 * float(right / seen)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass's context for a recipe's ``precision``."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
