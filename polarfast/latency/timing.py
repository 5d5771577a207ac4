"""One operator at other widths than the network's, timed as it runs inside a network."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import PUT_BACK, PutBack
from ..tracing.operations import Operation, TensorArg, map_args

#: Calls between two events on a GPU, where starting one takes longer than many operators do.
CALLS_ON_GPU = 20
#: Elements of the memory that weights are taken from: more than caches hold.
COLD = 2**25
_ALIGNED = 64  # elements
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True, eq=False)
class Call:
    """An operator and what it works on.

    Attributes:
        run: calls it.
        input: the activation that it reads; None: it reads none.
    """

    run: Callable[[], Any]
    input: Tensor | None


class Bench:
    """Where operators are timed.

    Activations are written right before the call, as the operator before it would have done;
    weights have been out of use for a while.

    Args:
        device: where.
        dtype: of floating point tensors.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        # Of all calls, as one runs at a time: what was just written, and what was not.
        self._fresh, self._cold, self._place = torch.empty(0), torch.empty(0), 0

    def call(self, operation: Operation, args: Any, kwargs: dict[str, Any]) -> Call:
        """The operator on arguments of these sizes."""
        inputs: list[Tensor] = []

        def made(arg: TensorArg) -> Tensor:
            if arg.values is not None:
                values = arg.values
                for dim, size in enumerate(arg.shape):
                    values = values.narrow(dim, 0, size)
                return values.to(self._device)
            if arg.ids is None or inputs:
                return self._from_cold(arg)
            inputs.append(self._input(arg))
            return inputs[0]

        real, named = map_args(args, made), map_args(kwargs, made)
        if "device" in named:
            named["device"] = self._device
        return Call(lambda: operation.func(*real, **named), inputs[0] if inputs else None)

    def put_back(self, operation: Operation, kept: int) -> Call:
        """A normalization of so many channels that puts them back among all."""
        x: TensorArg = operation.args[0]
        full = x.shape[1]
        kind = _NORMS[len(x.shape)]
        norm: nn.Module = kind(kept, device=self._device, dtype=self._dtype).eval()
        norm.__class__ = PUT_BACK[kind]
        assert isinstance(norm, PutBack)
        places = torch.linspace(0, full - 1, kept, device=self._device).long()
        norm.hold(places, torch.zeros(full, device=self._device, dtype=self._dtype))
        input = self._input(x.with_sizes({1: kept}))
        return Call(lambda: norm(input), input)

    def _input(self, arg: TensorArg) -> Tensor:
        if self._fresh.numel() < arg.elements:
            self._fresh = torch.empty(arg.elements, device=self._device, dtype=self._dtype)
        return _shaped(self._fresh[: arg.elements], arg)

    def _from_cold(self, arg: TensorArg) -> Tensor:
        """Numbers between 0.5 and 1.5: no operator is slow on these."""
        start = self._place
        end = start + arg.elements
        if end > self._cold.numel():
            start, end = 0, arg.elements
            if end > self._cold.numel():
                size = max(COLD, end)
                cold = torch.rand(size, device=self._device).add_(0.5)
                self._cold = cold.to(self._dtype)
        self._place = -(-end // _ALIGNED) * _ALIGNED
        return _shaped(self._cold[start:end], arg)

    def time(self, call: Call) -> float:
        """Of one call, in ms, until it is done."""
        if call.input is not None:
            call.input.fill_(1.0)
        if self._device.type != "cuda":
            start = time.perf_counter()
            call.run()
            return 1000 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(CALLS_ON_GPU):
            call.run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / CALLS_ON_GPU


def _shaped(flat: Tensor, arg: TensorArg) -> Tensor:
    if arg.channels_last:
        n, c, h, w = arg.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    if arg.transposed:
        return flat.view(arg.shape[::-1]).t()
    return flat.view(arg.shape)


@torch.inference_mode()
def times_in_turns(bench: Bench, calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Times of each call, in ms, one a round, in which they take turns in any order: the same one
    before would leave it the same caches. A first round, in which libraries prepare for new sizes,
    is not counted.
    """
    times: list[list[float]] = [[] for _ in calls]
    draws = random.Random(0)
    for round_ in range(rounds + 1):
        for place in draws.sample(range(len(calls)), len(calls)):
            ms = bench.time(calls[place])
            if round_:
                times[place].append(ms)
    return times
