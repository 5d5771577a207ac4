"""`plan.profile`: what fewer multiply-accumulates promise, against the time they take."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError
from .inputs import convert, describe, device_of, dtype_of, unwrap
from .layers import PutBack, PutBackAlone, plain_type
from .planning.pruning_plan import PruningPlan
from .running import call_model, copied_inputs, modes_kept, tensors_of
from .sharding import refuse_sharded
from .slimming.fuse import fuse
from .slimming.slim import slim as build_slim

#: Layers that are timed as a whole, whatever is inside them.
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)
#: A layer is pointed out if it saves less than this part of the time that its share promises,
MET = 0.5
#: and what it loses is at least this part of the slim model's time.
MATTERS = 0.01
#: Widths that fill the vector units of most machines are multiples of it.
STEP = 8


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
    fused: bool = False,
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
    device = device_of(model)
    if example_inputs is None:
        inputs = plan.inputs_like().make(device=device, dtype=dtype_of(model), seed=0)
    else:
        inputs = convert(example_inputs, device=device, dtype=dtype_of(model))
    if fused:
        model, small = (fuse(each, inputs) for each in (model, small))
    changed = _changed(model, small)
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
    with _in_eval_mode(models), torch.inference_mode():
        for model in models:
            for _ in range(3):
                _timed(model, inputs)
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(times[0]) < least:
            for model, passes in zip(models, times, strict=True):
                passes.append(_timed(model, inputs))
    return [statistics.median(passes) for passes in times]


def device_name(device: torch.device) -> str:
    """What latencies are measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


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

    with _in_eval_mode([model]), FlopCounterMode(display=False) as counter:
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
            clocks.append(_Clock({name: model.get_submodule(name) for name in names}, on_gpu))
        with _in_eval_mode(models), current:
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
        put_back=isinstance(after, PutBack | PutBackAlone),
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


class _Clock:
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


def _timed(model: nn.Module, inputs: Any) -> float:
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
def _in_eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """The models in eval mode; then every module's own mode again."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield


def hints(layers: Sequence[LayerTime], ms_before: float, ms: float, share: float) -> list[str]:
    """What could be done, the largest loss first.

    Args:
        layers: those that pruning changed.
        ms_before, ms: time of the whole model, before and after.
        share: the share of multiply-accumulates that is left.
    """
    found: list[tuple[float, str]] = []
    flagged = [layer for layer in layers if short(layer, ms)]
    put_back = [layer for layer in flagged if layer.put_back]
    computing = [layer for layer in flagged if layer.macs_before]
    odd = [layer for layer in computing if _odd(layer)]
    rest = [layer for layer in computing if layer not in odd]
    if put_back:
        text = (
            "their outputs have the full width again, which is memory traffic: "
            "residual='keep' or 'couple', or torch.compile, which fuses it with the addition"
        )
        found.append((_lost(put_back), f"{_named(put_back, 'norm', 'put channels back')}: {text}"))
    if odd:
        text = f"widths that are no multiples of {STEP}: plan with round_to={STEP} or more"
        found.append((_lost(odd), f"{_named(odd, 'layer', 'gain little')}: {text}"))
    if rest:
        text = (
            "their widths are not the reason; memory traffic or the cost of a call may be: larger "
            "batches, or other layers to prune"
        )
        found.append((_lost(rest), f"{_named(rest, 'layer', 'gain little')}: {text}"))
    outside = ms - sum(layer.ms for layer in layers)
    if ms_before - ms < MET * (1 - share) * ms_before and outside > ms / 2:
        text = f"{outside:.3g} of {ms:.3g} ms are spent outside the layers that were pruned"
        found.append((outside, text))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def short(layer: LayerTime, total_ms: float) -> bool:
    """Whether a layer is not as much faster as it should be, and that counts."""
    promised = (1 - layer.share) * layer.ms_before
    saved = layer.ms_before - layer.ms
    return saved < MET * promised and layer.lost_ms > MATTERS * total_ms


def _odd(layer: LayerTime) -> bool:
    """Whether pruning left it with a width that fills no vectors."""
    widths = zip(layer.channels_before, layer.channels, strict=True)
    return any(now != before and now % STEP for before, now in widths)


def _lost(layers: Sequence[LayerTime]) -> float:
    return sum(layer.lost_ms for layer in layers)


def _named(layers: Sequence[LayerTime], noun: str, verb: str) -> str:
    worst = sorted(layers, key=lambda layer: -layer.lost_ms)
    names = ", ".join(layer.name for layer in worst[:3]) + (" …" if len(worst) > 3 else "")
    plural = "s" if len(layers) > 1 else ""
    return f"{len(layers)} {noun}{plural} that {verb} ({names}) lose {_lost(layers):.2g} ms"


def table(profile: Profile) -> str:
    """A profile as people read it: layers with multiply-accumulates and norms that put channels
    back, line by line; then all others, and the whole.
    """
    shown = [layer for layer in profile.layers if layer.macs_before or layer.put_back]
    others = [layer for layer in profile.layers if layer not in shown]
    width = max([len(layer.name) for layer in shown] + [len("other changed layers")])
    head = f"{'layer':<{width}}  {'channels':>22}  {'expected':>8} {'measured':>8}"
    lines = [f"{head}  {'ms before':>9} {'ms':>9}"]
    for layer in shown:
        note = "  not faster accordingly" if short(layer, profile.ms) else ""
        channels = f"{_widths(layer.channels_before)} → {_widths(layer.channels)}"
        expected = 1 / layer.share if layer.share else float("inf")
        lines.append(_line(layer.name, width, channels, expected, layer.ms_before, layer.ms) + note)
    if others:
        before, after = (sum(ms) for ms in zip(*((x.ms_before, x.ms) for x in others), strict=True))
        lines.append(_line("other changed layers", width, "", None, before, after))
    outside = [
        whole - sum(parts)
        for whole, parts in (
            (profile.ms_before, [x.ms_before for x in profile.layers]),
            (profile.ms, [x.ms for x in profile.layers]),
        )
    ]
    lines.append(_line("all the rest", width, "", None, *outside))
    whole = (profile.expected, profile.ms_before, profile.ms)
    lines.append(_line("whole model", width, "", *whole))
    lines.append(
        f"{profile.macs_before:,} → {profile.macs:,} MACs; medians in eval mode on "
        f"{profile.device}, {profile.threads} CPU thread(s), inputs {_input_shapes(profile.inputs)}"
    )
    return "\n".join([*lines, *(f"hint: {hint}" for hint in profile.hints)])


def _line(
    name: str, width: int, channels: str, expected: float | None, before: float, after: float
) -> str:
    promised = "" if expected is None else f"{expected:.2f}×"
    measured = f"{before / after:.2f}×" if before > 0 and after > 0 else "—"
    speedups = f"{promised:>8} {measured:>8}"
    return f"{name:<{width}}  {channels:>22}  {speedups}  {before:>9.3f} {after:>9.3f}"


def _widths(channels: Sequence[int]) -> str:
    return "×".join(map(str, channels))


def _input_shapes(spec: object) -> str:
    """The shapes in a description of inputs."""
    found: list[str] = []

    def walk(part: object) -> None:
        if isinstance(part, dict):
            if "shape" in part:
                found.append("×".join(map(str, part["shape"])))
                return
            for child in part.values():
                walk(child)
        elif isinstance(part, list):
            for child in part:
                walk(child)

    walk(spec)
    return ", ".join(found)
