"""Accuracy on the test images, over all processes of a run."""

import math

import torch
from torch import nn

from polarfast.engine.data import DataSource
from polarfast.engine.workers import Workers

BATCH_PIXELS = 2**23  # over all channels: 56 images of ImageNet's size
LARGEST_BATCH = 500


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass's context for a recipe's ``precision``."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


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
