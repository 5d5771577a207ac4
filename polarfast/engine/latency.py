"""Latency of models on the machine at hand."""

import platform
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.inference_mode()
def median_latencies(
    models: Sequence[nn.Module], inputs: Tensor, seconds: float = 1.0, least: int = 10
) -> list[float]:
    """Median time of a forward pass of each model in eval mode, in ms.

    The models take turns, so that whatever else the machine does slows all of them alike.

    Args:
        inputs: one batch, on the models' device.
        seconds: measured for about this long in all, but
        least: at least this many passes of each.
    """
    modes = [model.training for model in models]
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model.eval()
        for _ in range(3):
            _timed(model, inputs)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[0]) < least:
        for model, passes in zip(models, times, strict=True):
            passes.append(_timed(model, inputs))
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return [statistics.median(passes) for passes in times]


def _timed(model: nn.Module, inputs: Tensor) -> float:
    on_gpu = inputs.is_cuda
    if on_gpu:
        torch.cuda.synchronize(inputs.device)
    start = time.perf_counter()
    model(inputs)
    if on_gpu:
        torch.cuda.synchronize(inputs.device)
    return 1000 * (time.perf_counter() - start)


def device_name(device: torch.device) -> str:
    """What latencies are measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
