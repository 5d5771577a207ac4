"""Latency: the right order, and models left as they were."""

import time

import torch
from torch import Tensor, nn

from polarfast.profiling import median_latencies


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.seen_training = seconds, False

    def forward(self, x: Tensor) -> Tensor:
        self.seen_training |= self.training
        time.sleep(self.seconds)
        return x


def test_medians_and_modes() -> None:
    slow, fast = Sleeper(0.01), Sleeper(0.001).eval()
    milliseconds = median_latencies([slow, fast], torch.zeros(1), seconds=0.05, least=5)
    assert milliseconds[0] >= 10 and 1 <= milliseconds[1] < milliseconds[0]
    assert slow.training and not fast.training
    assert not slow.seen_training
