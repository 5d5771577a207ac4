"""`LatencyTable`: how long a network takes at other widths, measured operator by operator."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import copy_of
from ..documents import (
    check_fields,
    list_of,
    mapping_of,
    parse_json,
    real,
    sealed,
    text,
    truth,
    unsealed,
    whole,
)
from ..errors import ArgumentError, FileFormatError, PlanError
from ..inputs import (
    Inputs,
    Spec,
    check_spec,
    convert,
    device_of,
    dtype_of,
    map_tensors,
    tensors_in,
    unwrap,
)
from ..layers import drop_gate, gated_modules
from ..planning.costs import PlanLatency
from ..planning.pruning_plan import PruningPlan
from ..planning.selection import Selection, can_vanish
from ..profiling import device_name, median_latencies
from ..sharding import refuse_sharded
from ..slimming.slim import slim as build_slim
from ..storage import read_text, write_atomically
from ..tracing.classes import Channels, trace_channels
from .measuring import measure as measure_times
from .prices import Line, Prices, Times
from .progress import bar
from .timing import Bench

Device = torch.device  # `Setting` has a field torch
FORMAT, VERSION = "polarfast-latency-table", 1
#: By so much the times of two networks may differ that count as one: another head.
OTHER_NETWORK = 0.1
_HINT = "give the path that LatencyTable.save wrote"
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

_POINT = list_of(real(0.0, math.inf))
_FIELDS = {
    "format": text,
    "version": whole(VERSION, VERSION),
    "setting": lambda value: isinstance(value, dict),
    "inputs": lambda value: isinstance(value, dict),
    "step": whole(1, 2**20),
    "ms": real(0.0, math.inf),
    "parts": _POINT,
    "projections": mapping_of(list_of(_POINT)),
    "others": mapping_of(list_of(_POINT)),
    "put_backs": mapping_of(list_of(_POINT)),
}
_SETTING = {
    "device": text,
    "dtype": lambda name: isinstance(getattr(torch, str(name), None), torch.dtype),
    "memory_format": lambda name: name in _LAYOUTS,
    "compiled": truth,
    "threads": whole(1, 2**20),
    "torch": text,
}


@dataclass(frozen=True)
class Setting:
    """What times hold for.

    Attributes:
        device: in words.
        dtype: of weights and inputs, "float32".
        memory_format: "contiguous" or "channels_last".
        compiled: whether `torch.compile` runs the network.
        threads: of the CPU.
        torch: its version.
    """

    device: str
    dtype: str
    memory_format: str
    compiled: bool
    threads: int
    torch: str

    def differences(self, device: Device) -> list[str]:
        """What is different on this machine."""
        here = {
            "device": device_name(device),
            "threads": f"{torch.get_num_threads()} threads",
            "torch": f"torch {torch.__version__}",
        }
        own = {
            "device": self.device,
            "threads": f"{self.threads} threads",
            "torch": f"torch {self.torch}",
        }
        return [f"{here[name]}, not {own[name]}" for name in here if own[name] != here[name]]

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return (
            f"{self.device}, {self.threads} thread{'s' * (self.threads != 1)}, {self.dtype}, "
            f"{self.memory_format}{compiled}, torch {self.torch}"
        )


class LatencyTable:
    """How long each operator of a network takes at other widths, on one machine, and from that the
    time of the network under any plan.

    Times are those of inference (eval mode). A table is of one network, one size of inputs and one
    setting (device, dtype, memory format, threads): those of use. It can be saved, and read where
    the network is trained.

    Attributes:
        setting: what it holds for.
        inputs: description of the inputs (JSON data).
        step: widths within one step are taken to be as fast, and plans use whole ones.
        ms: the network's time as it is, measured.
    """

    def __init__(
        self,
        times: Times,
        setting: Setting,
        inputs: Spec,
        ms: float,
        parts: tuple[float, float],
    ) -> None:
        """`parts`: what convolutions and linear layers, and all others, add up to (ms)."""
        self._times, self.setting, self.inputs, self.ms = times, setting, inputs, ms
        self._parts = parts

    @property
    def step(self) -> int:
        return self._times.step

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_inputs: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        compiled: bool = False,
        step: int = 8,
        error: float = 0.01,
        seconds: float = 60.0,
        progress: bool = True,
    ) -> LatencyTable:
        """Time every operator of a network at many widths. The model is left as found.

        All operators take turns, twice at least and then until the sum over the network is known to
        `error`. Convolutions and linear layers are timed at eighths of both of their widths;
        between these, times are interpolated.

        Args:
            model: the network.
            example_inputs: as for `plan`; of the batch size and resolution of use.
            device, dtype: of use; by default the model's own.
            memory_format: of use; `torch.channels_last` for images.
            compiled: the network is run by `torch.compile`. Convolutions and linear layers are
                timed as they are; what else it does, which a compiler fuses, as a whole.
            step: widths are planned in multiples of this, and others count as the next one. 8 fills
                the vector units of most machines, tensor cores with 16-bit numbers, too.
            error: standard error of the sum at which to stop.
            seconds: after about so long it stops in any case.
            progress: show a bar, on a terminal where rich is installed.

        Raises:
            ArgumentError: an argument is out of range, or the model is sharded.
            TracingError: the model does not run on the example inputs.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise ArgumentError(f"step={step!r}: give the channels of one step, 1 or more")
        if not seconds > 0 or not error > 0:
            raise ArgumentError(f"seconds={seconds!r}, error={error!r}: give numbers above 0")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ArgumentError(f"dtype={dtype!r}: give a torch.dtype, as torch.float16")
        if memory_format not in _LAYOUTS.values():
            known = ", ".join(map(str, _LAYOUTS.values()))
            raise ArgumentError(f"memory_format={memory_format}: choose one of {known}")
        model = unwrap(model)
        refuse_sharded(model)
        spec = Inputs.of(example_inputs).specs[0]
        ranks = {tensor.dim() for tensor in tensors_in(example_inputs)}
        if memory_format is torch.channels_last and 4 not in ranks:
            raise ArgumentError(
                "memory_format=torch.channels_last: it is for images, and no input has four "
                "dimensions; leave it out"
            )
        own = _Deployed(
            torch.device(device_of(model) if device is None else device),
            dtype_of(model) if dtype is None else dtype,
            memory_format,
            compiled,
        )
        if own.device.type not in ("cpu", "cuda"):
            raise ArgumentError(f"device={own.device}: latency is measured on CPUs and CUDA GPUs")
        network, inputs = own.model(model), own.inputs(example_inputs)
        channels = trace_channels(network, inputs, "keep", with_operations=True)
        bench = Bench(own.device, own.dtype)
        on_gpu = torch.cuda.device(own.device) if own.device.type == "cuda" else nullcontext()
        with on_gpu, bar("measuring latency", progress) as passed:
            times = measure_times(
                channels.graph.operations,
                bench,
                step,
                error=error,
                seconds=seconds,
                progress=passed,
            )
            (ms,) = median_latencies([own.runs(network)], inputs, min(seconds / 4, 4.0))
        everything = ~channels.graph.mask()
        parts = Prices(times, channels, (1.0, 1.0), 0.0).parts(everything)
        return cls(times, own.setting(), spec, ms, parts)

    # --- what it says

    def prices(self, channels: Channels) -> Callable[[Tensor], float]:
        """ms as a function of the classes that stay (bool by label), of this network, traced with
        its operations.

        Raises:
            PlanError: it runs an operator that was not timed.
        """
        projections, others = self._parts
        if self.setting.compiled:  # what is fused takes what is left
            scale = min(1.0, self.ms / projections) if projections else 1.0
            left = self.ms - scale * projections
            fused = left / others if others else 0.0
            return Prices(self._times, channels, (scale, fused), left - fused * others)
        total = projections + others
        scale = min(1.0, self.ms / total) if total else 1.0
        return Prices(self._times, channels, (scale, scale), self.ms - scale * total)

    def check_network(self, channels: Channels) -> None:
        """Raise PlanError unless this is the network that was measured: its convolutions and linear
        layers, as wide as they are, take as long by the table (but for a head of another width).
        """
        everything = ~channels.graph.mask()
        own, _ = Prices(self._times, channels, (1.0, 1.0), 0.0).parts(everything)
        measured, _ = self._parts
        if abs(own - measured) > OTHER_NETWORK * measured:
            raise PlanError(
                f"the latency table is of another network: by its times, the convolutions and "
                f"linear layers of the one that was measured take {measured:.3g} ms, this one's "
                f"{own:.3g} ms; measure a table of this one (pf.LatencyTable.measure)"
            )

    def check_inputs(self, example_inputs: Any) -> None:
        """Raise PlanError unless they have the sizes that the table was measured with."""
        found = Inputs.of(example_inputs).specs[0]
        if _sizes(found) != _sizes(self.inputs):
            raise PlanError(
                f"the latency table was measured with inputs of sizes {_sizes(self.inputs)}, these "
                f"have {_sizes(found)}: pass inputs of those sizes, or measure a table with these"
            )

    def latency(
        self, plan: PruningPlan, model: nn.Module | None = None, inputs: Any = None
    ) -> float:
        """The time of a plan's slim model, in ms, as predicted.

        Args:
            plan: of the network that the table is of.
            model: the network; needed where the plan was read from a file.
            inputs: example inputs, as for `slim`.

        Raises:
            PlanError: the plan is not of this network, or `model` is missing.
        """
        if not isinstance(plan, PruningPlan):
            raise ArgumentError(
                f"table.latency(plan) was given a {type(plan).__name__}: pass what pf.plan returned"
            )
        if model is None:
            model = plan.network()
        if model is None:
            raise PlanError("the plan was read from a file: pass model=, the network that it is of")
        price, stays = self._price(plan, unwrap(model), plan.inputs_like(inputs))
        return price(stays)

    def _price(
        self, plan: PruningPlan, model: nn.Module, inputs: Inputs
    ) -> tuple[Callable[[Tensor], float], Tensor]:
        """The prices of a plan's network, and the classes that stay."""
        example = _made(inputs, model)
        self.check_inputs(example)
        channels = trace_channels(model, example, plan.residual, with_operations=True)
        unknown = [name for name in plan.kept if name not in channels.layers]
        if unknown:
            raise PlanError(f"{unknown[0]} takes no part in this model: pass the plan's network")
        if not hasattr(model, "polarfast_info"):
            self.check_network(channels)
        choice = Selection(channels, plan.kept)
        choice.adopt(plan.kept)
        choice.drop_unread(can_vanish(model, channels))
        constant = {
            int(channels.layers[name][place])
            for name, layer in plan.layers.items()
            for place in layer.constant
        }
        return self.prices(channels), choice.staying(constant)

    def measured(self, model: nn.Module, plan: PruningPlan) -> PlanLatency:
        """A plan's latency as predicted; measured, too, if this is the machine that the table was
        measured on, as it was then.
        """
        model = unwrap(model)
        if differences := self.setting.differences(device_of(model)):
            price, stays = self._price(plan, model, plan.inputs_like())
            before, after = price(torch.ones_like(stays)), price(stays)
            setting = f"{self.setting}, not measured here ({'; '.join(differences)})"
            return PlanLatency(before, after, setting=setting)
        return self.check(model, plan)

    def check(
        self,
        model: nn.Module,
        plan: PruningPlan,
        *,
        slim: nn.Module | None = None,
        inputs: Any = None,
        seconds: float = 4.0,
    ) -> PlanLatency:
        """Measure the whole network and its slim model, in turns, beside what is predicted. Both
        are left as found.

        Args:
            model: the network.
            plan: what to make of it.
            slim: its slim model; by default made here.
            inputs: example inputs, as for `slim`.
            seconds: measured for about this long.

        Raises:
            ArgumentError: this is another machine than the table is of.
            PlanError: as for `latency`.
        """
        model = unwrap(model)
        own = _Deployed.of(self.setting, device_of(model))
        if differences := self.setting.differences(own.device):
            raise ArgumentError(
                f"the latency table does not fit this machine ({'; '.join(differences)}): measure "
                "one here, or check where it was measured"
            )
        examples = plan.inputs_like(inputs)
        price, stays = self._price(plan, model, examples)
        if slim is None:
            with warnings.catch_warnings():  # who builds it to use it is told then
                warnings.simplefilter("ignore", UserWarning)
                small = build_slim(model, plan, verify=False, inputs=inputs)
        else:
            small = unwrap(slim)
        networks = [own.runs(own.model(each)) for each in (model, small)]
        before, after = median_latencies(networks, own.inputs(_made(examples, model)), seconds)
        predicted = price(torch.ones_like(stays)), price(stays)
        return PlanLatency(*predicted, before, after, str(self.setting))

    # --- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON text.

        Raises:
            OSError: it cannot be written.
        """
        times = self._times
        data = {
            "format": FORMAT,
            "version": VERSION,
            "setting": asdict(self.setting),
            "inputs": self.inputs,
            "step": times.step,
            "ms": self.ms,
            "parts": list(self._parts),
            "projections": {
                key: [[*pair, ms] for pair, ms in found.items()]
                for key, found in times.projections.items()
            },
            "others": {key: list(map(list, line)) for key, line in times.others.items()},
            "put_backs": {key: list(map(list, line)) for key, line in times.put_backs.items()},
        }
        written = json.dumps(sealed(data), indent=1)
        write_atomically(Path(path), lambda part: part.write_text(written, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """The inverse of `save`.

        Raises:
            FileFormatError: it is no latency table, damaged, or of a newer polarfast.
            FileNotFoundError: there is no such file.
        """
        try:
            data = parse_json(read_text(path, _HINT))
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f'no "format": "{FORMAT}"')
            data = check_fields(unsealed(data), _FIELDS, "the table")
            setting = Setting(**check_fields(data["setting"], _SETTING, "its setting"))
            check_spec(data["inputs"])
            times = _times(data)
            if len(data["parts"]) != 2:
                raise ValueError("parts are not two numbers")
        except ValueError as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"'{path}' is no latency table: {error}; {_HINT}") from error
        return cls(times, setting, data["inputs"], data["ms"], tuple(data["parts"]))

    def __repr__(self) -> str:
        points = sum(map(len, self._times.projections.values()))
        lines = [*self._times.others.values(), *self._times.put_backs.values()]
        return (
            f"LatencyTable({self.ms:.3g} ms; {points + sum(map(len, lines)):,} times in steps of "
            f"{self.step} channels; {self.setting})"
        )


@dataclass(frozen=True)
class _Deployed:
    """How a network is run in use."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    compiled: bool

    @classmethod
    def of(cls, setting: Setting, device: torch.device) -> _Deployed:
        layout = _LAYOUTS[setting.memory_format]
        return cls(device, getattr(torch, setting.dtype), layout, setting.compiled)

    def setting(self) -> Setting:
        layout = next(name for name, each in _LAYOUTS.items() if each is self.memory_format)
        return Setting(
            device_name(self.device),
            str(self.dtype).removeprefix("torch."),
            layout,
            self.compiled,
            torch.get_num_threads(),
            torch.__version__,
        )

    def model(self, model: nn.Module) -> nn.Module:
        """A copy of a model as it is in use."""
        own = copy_of(model).eval()
        for _, module in list(gated_modules(own)):
            drop_gate(module)  # a slim model has none
        own = own.to(device=self.device, dtype=self.dtype)
        return own.to(memory_format=self.memory_format)

    def inputs(self, example_inputs: Any) -> Any:
        """Inputs for it."""
        return map_tensors(
            convert(example_inputs, device=self.device, dtype=self.dtype),
            lambda t: t.contiguous(memory_format=self.memory_format) if t.dim() == 4 else t,
        )

    def runs(self, model: nn.Module) -> nn.Module:
        """What is called."""
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]


def _made(inputs: Inputs, model: nn.Module) -> Any:
    return inputs.make(device=device_of(model), dtype=dtype_of(model), seed=0)


def _sizes(spec: Spec) -> Any:
    """Shapes in a description of inputs."""
    if "shape" in spec:
        return list(spec["shape"])
    if "value" in spec:
        return None
    parts: Sequence[Spec] | dict[str, Spec] = next(iter(spec.values()))
    if isinstance(parts, dict):
        return {name: _sizes(part) for name, part in parts.items()}
    return [_sizes(part) for part in parts]


def _times(data: dict[str, Any]) -> Times:
    """From JSON data.

    Raises:
        ValueError: points have too few or too many numbers.
    """
    times = Times(data["step"])
    for key, points in data["projections"].items():
        if any(len(point) != 3 for point in points):
            raise ValueError("a time of a projection is not three numbers")
        times.projections[key] = {(int(i), int(o)): float(ms) for i, o, ms in points}
    for name in ("others", "put_backs"):
        lines: dict[str, Line] = getattr(times, name)
        for key, points in data[name].items():
            shares = [point[0] for point in points]
            pairs = all(len(point) == 2 for point in points)
            if not points or not pairs or shares != sorted(set(shares)) or shares[-1] > 1.0:
                raise ValueError("times are not pairs of an ascending share and ms")
            lines[key] = [(float(share), float(ms)) for share, ms in points]
    return times
