"""A machine on which an operator takes a known time: predicted latencies can then be checked to
rounding, by running the slim model on it.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polarfast.inputs import tensors_in
from polarfast.latency import table
from polarfast.latency.timing import Bench
from polarfast.running import copied_inputs


class Machine(TorchDispatchMode):
    """Adds up what operators take: so much each, for what they read and write, and for what they
    multiply.

    Args:
        stairs: convolutions and linear layers with any width above a multiple of this take as long
            as with the next.
    """

    def __init__(self, stairs: int = 1) -> None:
        super().__init__()
        self.ms, self.stairs = 0.0, stairs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        name = func.overloadpacket.__name__
        if name in ("convolution", "addmm", "mm"):
            self.ms += self._product(name, args, out)
        elif tensors_in((args, kwargs)):
            self.ms += 1e-6 * sum(t.numel() for t in tensors_in(args) if t.is_floating_point())
        return out

    def _product(self, name, args, out):
        x, weight = args[:2] if name != "addmm" else args[1:3]
        step = self.stairs
        if name == "convolution" and args[8] > 1:  # grouped: its channels as they are
            step = 1
        reads, writes = (-(-n // step) * step for n in (x.shape[1], out.shape[1]))
        places = out.numel() // out.shape[1]
        inputs = x.numel() // x.shape[1]
        groups = args[8] if name == "convolution" else 1
        taps = weight[0, 0].numel() if name == "convolution" else 1
        macs = places * taps * writes * reads / groups
        return 1e-3 + 1e-6 * inputs * reads + 2e-6 * places * writes + 1e-7 * macs


def of(model, inputs, stairs=1) -> float:
    """What a forward pass takes."""
    args, kwargs = copied_inputs(inputs)
    with torch.no_grad(), Machine(stairs) as machine:
        model(*args, **kwargs)
    return machine.ms


@contextlib.contextmanager
def pretended(monkeypatch, stairs: int = 1) -> Iterator[None]:
    """Times are those of `Machine`."""

    def time(self, call):
        if call.input is not None:
            call.input.fill_(1.0)
        with Machine(stairs) as machine:
            call.run()
        return machine.ms

    def median_latencies(models, inputs, seconds=1.0, least=10):
        return [of(model, inputs, stairs) for model in models]

    with monkeypatch.context() as patched:
        patched.setattr(Bench, "time", time)
        patched.setattr(table, "median_latencies", median_latencies)
        yield
