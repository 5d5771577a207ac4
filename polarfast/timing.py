"""Latency of models on the machine at hand."""

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .tracing.calling import copied_inputs, tensors_of


def median_latencies(
    models: Sequence[nn.Module], inputs: Any, seconds: float = 1.0, least: int = 10
) -> list[float]:
    """Median time of a forward pass of each model in eval mode, in ms.

    The models take turns, so that whatever else the machine does slows all of them alike.

    Args:
        inputs: a tensor, a tuple of positional or a dict of keyword inputs, on the models' device.
        seconds: measured for about this long in all, but
        least: at least this many passes of each.
    """
    times: list[list[float]] = [[] for _ in models]
    with in_eval_mode(models), torch.inference_mode():
        for model in models:
            for _ in range(3):
                timed(model, inputs)
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(times[0]) < least:
            for model, passes in zip(models, times, strict=True):
                passes.append(timed(model, inputs))
    return [statistics.median(passes) for passes in times]


def timed(model: nn.Module, inputs: Any) -> float:
    """Time of one call, in ms, until the device is done."""
    args, kwargs = copied_inputs(inputs)
    device = next((t.device for t in tensors_of(inputs) if t.is_cuda), None)
    if device is not None:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(*args, **kwargs)
    if device is not None:
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


@contextmanager
def in_eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """The models in eval mode; then every module's own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Clock:
    """Time spent in modules during a forward pass, from hooks; calls of one module are added up.

    On GPUs it is the device's time, from events; on CPUs the process's wall clock.
    """

    def __init__(self, modules: dict[str, nn.Module], on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}
        self._starts: dict[str, Any] = {}
        self._handles = []
        for name, module in modules.items():
            # The last of all hooks before, the first of all behind: theirs is not the layer's time.
            before, after = self._before(name), self._after(name)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, prepend=True))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._starts[name] = self._now()

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._marks[name].append((self._starts[name], self._now()))

        return hook

    def read(self) -> dict[str, float]:
        """Module name -> ms since the last reading."""
        found = {}
        for name, marks in self._marks.items():
            if self._on_gpu:
                for _, end in marks:
                    end.synchronize()
                found[name] = sum(start.elapsed_time(end) for start, end in marks)
            else:
                found[name] = 1000 * sum(end - start for start, end in marks)
            marks.clear()
        return found

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


def device_name(device: torch.device) -> str:
    """What latencies are measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
