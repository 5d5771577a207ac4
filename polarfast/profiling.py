"""`plan.profile`: what fewer multiply-accumulates promise, against the time they take."""

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError
from .gates import plain_type
from .inputs import convert, describe, device_of, dtype_of, generate, unwrap
from .modules import PutBackMixin
from .plans import PruningPlan
from .profile_text import hints, table
from .sharded import refuse_sharded
from .slimming import slim as build_slim
from .timing import Clock, device_name, in_eval_mode, median_latencies
from .tracing.calling import call_model

#: Layers that are timed as a whole, whatever is inside them.
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class LayerTime:
    """One layer that pruning changed.

    Attributes:
        name, kind: of the module; its class in the original, without a gate.
        channels_before, channels: [inputs, outputs] of a convolution or linear layer, [channels] of
            others that have any.
        depthwise: a convolution of one channel a group.
        put_back: a norm whose output has the full width again.
        macs_before, macs: multiply-accumulates of one forward pass.
        ms_before, ms: median time of one forward pass, in ms.
    """

    name: str
    kind: str
    channels_before: list[int]
    channels: list[int]
    depthwise: bool
    put_back: bool
    macs_before: int
    macs: int
    ms_before: float
    ms: float

    @property
    def share(self) -> float:
        """The share of work left, by multiply-accumulates; layers without any: by what they read
        and write.
        """
        if self.macs_before:
            return self.macs / self.macs_before
        before, after = (max(sum(n), 1) for n in (self.channels_before, self.channels))
        if self.put_back:
            return (after + before) / (2 * before)
        return after / before

    @property
    def lost_ms(self) -> float:
        """How much longer it takes than its share of the original's time."""
        return self.ms - self.share * self.ms_before


@dataclass(frozen=True)
class Profile:
    """Expected against measured latency, in eval mode.

    Attributes:
        layers: those that pruning changed, in the model's order.
        macs_before, macs: multiply-accumulates of one forward pass on the inputs.
        ms_before, ms: median time of a whole forward pass, in ms, measured with no hooks on.
        inputs: description of the inputs (JSON data).
        device: what it was measured on, in words.
        threads: of the CPU.
        hints: what could be done where fewer multiply-accumulates are not faster.
    """

    layers: list[LayerTime]
    macs_before: int
    macs: int
    ms_before: float
    ms: float
    inputs: dict[str, Any]
    device: str
    threads: int
    hints: list[str]

    @property
    def expected(self) -> float:
        """Speed-up if time were proportional to multiply-accumulates."""
        return self.macs_before / self.macs if self.macs else float("inf")

    @property
    def measured(self) -> float:
        """Speed-up."""
        return self.ms_before / self.ms

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        return table(self)


def profile(
    plan: PruningPlan,
    model: nn.Module,
    slim: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    seconds: float = 4.0,
) -> Profile:
    """`PruningPlan.profile`."""
    if not seconds > 0:
        raise ArgumentError(f"seconds={seconds}: pass how long to measure, more than 0")
    model = unwrap(model)
    small = build_slim(model, plan, verify=False) if slim is None else unwrap(slim)
    for either in (model, small):
        refuse_sharded(either)
    if device_of(model) != device_of(small):
        raise ArgumentError(
            f"model is on {device_of(model)}, slim on {device_of(small)}: move one to the other"
        )
    changed = _changed(model, small)
    device = device_of(model)
    if example_inputs is None:
        inputs = generate(plan.inputs, device=device, dtype=dtype_of(model), seed=0)
    else:
        inputs = convert(example_inputs, device=device, dtype=dtype_of(model))
    models = [model, small]
    macs = [_macs(each, inputs) for each in models]
    before, after = median_latencies(models, inputs, seconds / 2, least=5)
    times = _layer_times(models, inputs, changed, seconds / 2, device)
    layers = [_row(model, small, name, macs, times) for name in changed]
    return Profile(
        layers=layers,
        macs_before=macs[0][""],
        macs=macs[1][""],
        ms_before=before,
        ms=after,
        inputs=describe(inputs),
        device=device_name(device),
        threads=torch.get_num_threads(),
        hints=hints(layers, before, after, macs[1][""] / max(macs[0][""], 1)),
    )


def _units(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> the layers, none inside another."""
    found: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, LAYERS) or not any(True for _ in module.children()):
            found[name] = module
            return
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}".lstrip("."), child)

    walk("", model)
    return found


def _changed(model: nn.Module, small: nn.Module) -> list[str]:
    """Names of the layers that are not what they were.

    Raises:
        ArgumentError: `small` has other layers than `model`.
    """
    before, after = _units(model), _units(small)
    if list(before) != list(after):
        different = sorted(set(before) ^ set(after)) or list(before)
        raise ArgumentError(
            f"slim is not a slim model of model: {different[0]!r} is a layer of one of them only"
        )
    return [name for name in before if _shapes(before[name]) != _shapes(after[name])]


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in module.parameters()]


@torch.no_grad()
def _macs(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Layer name -> multiply-accumulates of one forward pass; "" for the whole model."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, where there is one

    with in_eval_mode([model]), FlopCounterMode(display=False) as counter:
        call_model(model, inputs)
    found = {"": counter.get_total_flops() // 2}
    for name, flops in counter.get_flop_counts().items():
        inner = name.partition(".")[2]  # after the model's own class
        if inner:
            found[inner] = sum(flops.values()) // 2
    return found


@torch.inference_mode()
def _layer_times(
    models: Sequence[nn.Module], inputs: Any, names: list[str], seconds: float, device: torch.device
) -> list[dict[str, float]]:
    """For each model, layer name -> median ms; the models take turns."""
    found: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in models]
    clocks = []
    on_gpu = device.type == "cuda"
    # Events are recorded on the current device, which need not be the models'.
    current: AbstractContextManager[object]
    current = torch.cuda.device(device) if on_gpu else nullcontext()
    try:
        for model in models:
            clocks.append(Clock({name: model.get_submodule(name) for name in names}, on_gpu))
        with in_eval_mode(models), current:
            deadline, rounds = time.perf_counter() + seconds, 0
            while time.perf_counter() < deadline or rounds < 6:
                for model, clock, times in zip(models, clocks, found, strict=True):
                    call_model(model, inputs)
                    reading = clock.read()
                    if rounds:  # the first warms up
                        for name, ms in reading.items():
                            times[name].append(ms)
                rounds += 1
    finally:
        for clock in clocks:
            clock.remove()
    return [{name: statistics.median(ms) for name, ms in times.items()} for times in found]


def _row(
    model: nn.Module,
    small: nn.Module,
    name: str,
    macs: list[dict[str, int]],
    times: list[dict[str, float]],
) -> LayerTime:
    before, after = model.get_submodule(name), small.get_submodule(name)
    groups = getattr(before, "groups", 1)
    return LayerTime(
        name=name,
        kind=plain_type(before).__name__,
        channels_before=_channels(before),
        channels=_channels(after),
        depthwise=groups > 1 and groups == getattr(before, "in_channels", None),
        put_back=isinstance(after, PutBackMixin),
        macs_before=macs[0].get(name, 0),
        macs=macs[1].get(name, 0),
        ms_before=times[0][name],
        ms=times[1][name],
    )


def _channels(module: nn.Module) -> list[int]:
    for names in (
        ("in_channels", "out_channels"),
        ("in_features", "out_features"),
        ("num_features",),
        ("num_channels",),
    ):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return [getattr(module, name) for name in names]
    return [tensor.shape[0] for tensor in module.parameters()][:1]
