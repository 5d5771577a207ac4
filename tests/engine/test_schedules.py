"""Learning rates, against torch's own schedulers."""

import pytest
import torch
from torch import nn

from polarfast.engine.recipe import Stage
from polarfast.engine.trainer import learning_rate


def test_cosine_with_warmup_is_torchs() -> None:
    stage, steps = Stage(epochs=4, lr=0.4, warmup=1), 10
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    lr = torch.optim.lr_scheduler
    rising = lr.LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=9)
    falling = lr.CosineAnnealingLR(optimizer, T_max=30)
    schedule = lr.SequentialLR(optimizer, [rising, falling], milestones=[10])
    for step in range(40):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(stage, step, steps) == pytest.approx(expected, rel=1e-6), step
        optimizer.step()
        schedule.step()


def test_steps_are_torchs() -> None:
    stage = Stage(epochs=9, lr=0.1, schedule="step", rates={3: 0.01, 6: 0.001})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], gamma=0.1)
    for epoch in range(9):
        for step in range(5):
            expected = optimizer.param_groups[0]["lr"]
            assert learning_rate(stage, 5 * epoch + step, 5) == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_constant_rate() -> None:
    stage = Stage(epochs=2, lr=0.4, schedule="constant", warmup=0.5)
    rates = [learning_rate(stage, step, 4) for step in range(8)]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
