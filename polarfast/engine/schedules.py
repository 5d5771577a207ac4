"""Learning rates over a stage."""

import math

from polarfast.engine.recipe import Stage


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
