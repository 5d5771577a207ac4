"""The training loop: one stage of epochs over a data set, resumable to the bit; and evaluation."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import polarfast as pf
from polarfast.engine.data import DataSet, Images, batches
from polarfast.engine.recipe import Recipe, Stage
from polarfast.errors import ArgumentError


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """The rate of step number ``step`` (from 0) of a stage of ``steps`` steps."""
    warmup = round(stage.warmup * steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, batch_size: int = 512) -> float:
    """Share of the images that the model, in eval mode, classifies rightly, in percent."""
    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        right += int((model(images.images[rows]).argmax(1) == images.labels[rows]).sum())
    model.train(was_training)
    return 100 * right / len(images)


class Trainer:
    """Trains a model for one stage with SGD; with scaling factors, through ``pf.step``.

    Args:
        model: on the data's device.
        stage: epochs and learning rate.
        generator: of the images' order and shifts; on the data's device.
        scales, regularizer: both for sparsity training, neither for plain training.

    Raises:
        ArgumentError: the batch size is larger than the training set.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataSet,
        recipe: Recipe,
        stage: Stage,
        generator: torch.Generator,
        scales: pf.ScalingFactors | None = None,
        regularizer: pf.Regularizer | None = None,
    ) -> None:
        self.model, self.data, self.recipe, self.stage = model, data, recipe, stage
        self.generator, self.scales, self.regularizer = generator, scales, regularizer
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise ArgumentError(
                f"batch_size={recipe.batch_size}: larger than the {len(data.train)} training images"
            )
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=stage.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.step = 0

    @property
    def epoch(self) -> int:
        """How many epochs of the stage are done."""
        return self.step // self.steps_per_epoch

    def run_epoch(self) -> float:
        """Train for one epoch; the mean loss of its steps, regularizer not included."""
        self.model.train()
        total = torch.zeros((), device=self.data.train.images.device)
        steps = self.steps_per_epoch * self.stage.epochs
        for images, labels in batches(
            self.data, self.recipe.batch_size, self.recipe.shift, self.generator
        ):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.stage, self.step, steps)
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.scales is not None and self.regularizer is not None:
                pf.step(self.optimizer, self.scales, self.regularizer)
            else:
                self.optimizer.step()
            total += loss.detach()
            self.step += 1
        return float(total) / self.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.generator.set_state(state["generator"].cpu())
