"""The pruning plan: what is kept and saved, as a table for people and as stable text."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..documents import (
    DIGEST,
    check_digests,
    check_fields,
    digests,
    list_of,
    mapping_of,
    one_of,
    optional,
    parse_json,
    real,
    short,
    text,
    whole,
)
from ..errors import PlanError
from ..folding.fold import FOLDS
from ..inputs import Inputs, alike, check_spec, with_meaning
from ..scaling.factors import kept_from_cutting
from ..tracing.classes import RESIDUAL_MODES
from .costs import PlanLatency

if TYPE_CHECKING:
    from ..folding.fold import Folded
    from ..profiling import Profile
    from ..tracing.classes import Traced

FORMAT = "polarfast-plan"
VERSION = 1
#: More channels, of all layers, than any network has; a text must not claim more.
MOST_CHANNELS = 2**22
_COUNT = whole(0, 2**63)
_FIELDS = {
    "format": text,
    "version": whole(VERSION, VERSION),
    "residual": one_of(*RESIDUAL_MODES),
    "method": text,
    "fold": one_of(*FOLDS),
    "inputs": lambda value: isinstance(value, dict),
    "macs_before": _COUNT,
    "macs": _COUNT,
    "params_before": _COUNT,
    "params": _COUNT,
    "layers": mapping_of(lambda value: isinstance(value, dict)),
    "pinned": mapping_of(text),
    "pinned_macs": mapping_of(real(-1.0, 1.0)),
    "inexact": mapping_of(text),
    "asked": mapping_of(lambda value: True),
    "remarks": list_of(text),
    "latency": lambda value: isinstance(value, dict),
}
#: Plans written before these were recorded have none of them.
_OPTIONAL = ("asked", "remarks", "pinned_macs", "latency")
_MS = real(0.0, math.inf)
_LATENCY = {
    "before": _MS,
    "after": _MS,
    "measured_before": optional(_MS),
    "measured": optional(_MS),
    "setting": text,
}
_LAYER = {
    "channels": whole(1, MOST_CHANNELS),
    "kept": list_of(lambda pair: isinstance(pair, list)),
    "threshold": optional(real(-math.inf, math.inf)),
    "constant": list_of(whole(0, MOST_CHANNELS)),
    "note": text,
}


@dataclass
class LayerPlan:
    """One layer of a plan.

    Attributes:
        channels: number of channels before.
        threshold: γ at or under it is removed; None: the layer has no threshold.
        note: what a reader of the plan should know; empty if nothing.
        constant: removed channels that stay as constant channels, to carry what the removed ones
            leave behind.
    """

    channels: int
    threshold: float | None
    note: str = ""
    constant: list[int] = field(default_factory=list)


@dataclass
class PruningPlan:
    """Which channels stay.

    Attributes:
        kept: γ name -> sorted int64 [K] of kept channels.
        layers: γ name -> `LayerPlan`.
        pinned, pinned_macs: BatchNorm weight -> why it takes no part; reason -> the share of the
            MACs that it keeps from being cut, as in `ScalingFactors`.
        residual, method, fold: how the plan was made.
        inputs: description of the example inputs (JSON data).
        macs_before, macs: multiply-accumulates of convolutions and linear layers on the example
            inputs.
        params_before, params: number of parameters, gates left out.
        inexact: reader's weight name -> why removed channels are not folded into it exactly.
        asked: the limits and the share to cut that the plan was made for, those that were given, by
            the name of `plan`'s argument (JSON data).
        remarks: what is to be known before the plan is used, in sentences; `plan` warns of each.
        latency: the time of a forward pass before and after, where a latency table was given.
        profiled: what `profile` measured last; not part of the plan's text.
    """

    kept: dict[str, Tensor]
    layers: dict[str, LayerPlan]
    pinned: dict[str, str]
    residual: str
    method: str
    fold: str
    inputs: dict[str, Any]
    macs_before: int
    macs: int
    params_before: int
    params: int
    inexact: dict[str, str] = field(default_factory=dict)
    pinned_macs: dict[str, float] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    latency: PlanLatency | None = None
    profiled: "Profile | None" = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        # For `slim` on the same model; no part of the plan, so neither compared, copied nor kept.
        self._traced: Traced | None = None
        self._folded: Folded | None = None
        self._gammas: dict[str, Tensor] = {}  # as they were
        self._inputs: Inputs | None = None  # with the examples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_traced": None, "_folded": None, "_gammas": {}, "_inputs": None}

    def inputs_like(self, given: Any = None) -> Inputs:
        """What to run its network on: the examples that it was made with, if they are still at
        hand, or those given.
        """
        if given is None:
            return self._inputs or Inputs((self.inputs,))
        own = Inputs.of(given)
        if not alike(own.specs[0], self.inputs):
            return own
        return Inputs.of(given, lambda _: with_meaning(self.inputs))

    def network(self) -> nn.Module | None:
        """The network that the plan was made for, if it was made here and is still kept."""
        return None if self._traced is None else self._traced.model

    @property
    def flops_reduction(self) -> float:
        """The share of multiply-accumulates cut: 1 − macs / macs_before (the paper's F)."""
        return 1.0 - self.macs / max(self.macs_before, 1)

    def to_json(self) -> str:
        """The plan as text. Kept channels are written as ranges; the format carries a version."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "residual": self.residual,
            "method": self.method,
            "fold": self.fold,
            "inputs": self.inputs,
            "macs_before": self.macs_before,
            "macs": self.macs,
            "params_before": self.params_before,
            "params": self.params,
            "layers": {
                name: {
                    "channels": layer.channels,
                    "kept": ranges(self.kept[name].tolist()),
                    "threshold": layer.threshold,
                    "constant": layer.constant,
                    "note": layer.note,
                }
                for name, layer in self.layers.items()
            },
            "pinned": self.pinned,
            "pinned_macs": self.pinned_macs,
            "inexact": self.inexact,
            "asked": self.asked,
            "remarks": self.remarks,
        }
        if self.latency is not None:
            data["latency"] = asdict(self.latency)
        return json.dumps({**data, DIGEST: digests(data)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """The inverse of `to_json`.

        Raises:
            PlanError: not a plan, damaged, or written by a newer polarfast.
        """
        if not isinstance(text, str):
            raise PlanError(f"a plan is read from its text, not from a {type(text).__name__}")
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"this is not a pruning plan: {error}") from error
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise PlanError(f'this is not a pruning plan (no "format": "{FORMAT}")')
        if data.get("version") != VERSION:
            raise PlanError(
                f"the plan has format version {short(data.get('version'))}, this polarfast reads "
                f"version {VERSION}: upgrade polarfast"
            )
        try:
            plan = _from_data({name: data[name] for name in data if name != DIGEST})
            # Last: where a field cannot be what it is, that says more.
            check_digests(data, _OPTIONAL)
            return plan
        except ValueError as error:
            raise PlanError(f"the plan is damaged: {error}") from error

    def profile(
        self,
        model: nn.Module,
        slim: nn.Module | None = None,
        example_inputs: Any = None,
        *,
        seconds: float = 4.0,
        fused: bool = False,
    ) -> "Profile":
        """Measure the slim model's latency beside the original's, layer by layer, in eval mode.

        What multiply-accumulates promise stands beside what the machine makes of it, with hints
        where the two part. From then on it is also part of the plan's table. The models take turns;
        the whole is timed with no hooks on; both are left as found.

        Args:
            model: the original.
            slim: the slim model; by default made here.
            example_inputs: of the batch size and resolution of use; by default random ones of the
                shapes that the plan was made with. They are converted to the model's device and
                dtype.
            seconds: measured for about this long in all.
            fused: measure both as `fuse` makes them for inference.

        Raises:
            ArgumentError: `slim` has other layers than `model`, or is on another device.
            PlanError: the plan does not fit `model`.
        """
        from ..profiling import profile  # builds slim models, which are built from plans

        self.profiled = profile(self, model, slim, example_inputs, seconds=seconds, fused=fused)
        return self.profiled

    def __str__(self) -> str:
        return table(self)


def _from_data(data: Mapping[str, Any]) -> PruningPlan:
    check_fields(data, _FIELDS, "the plan", _OPTIONAL)
    check_spec(data["inputs"])
    kept, layers = {}, {}
    for name, layer in data["layers"].items():
        check_fields(layer, _LAYER, f"layer {short(name)}")
        layers[name] = LayerPlan(
            layer["channels"], layer["threshold"], layer["note"], layer["constant"]
        )
    if sum(layer.channels for layer in layers.values()) > MOST_CHANNELS:
        raise ValueError(f"its layers have more than {MOST_CHANNELS:,} channels")
    for name, layer in layers.items():
        kept[name] = positions(data["layers"][name]["kept"], layer.channels, f"kept of {name}")
        removed = torch.ones(layer.channels, dtype=torch.bool, device="cpu")
        removed[kept[name]] = False
        before = -1
        for place in layer.constant:
            if not before < place < layer.channels or not removed[place]:
                raise ValueError(
                    f"constant channels of {short(name)} are not among the removed ones"
                )
            before = place
    names = {"format", "version", "layers", *_OPTIONAL}
    return PruningPlan(
        kept=kept,
        layers=layers,
        pinned_macs=dict(data.get("pinned_macs", {})),
        asked=data.get("asked", {}),
        remarks=data.get("remarks", []),
        latency=None
        if "latency" not in data
        else PlanLatency(**check_fields(data["latency"], _LATENCY, "its latency")),
        **{name: data[name] for name in _FIELDS if name not in names},
    )


def positions(pairs: Any, most: int, what: str, count: int | None = None) -> Tensor:
    """The inverse of `ranges`, int64 [K].

    Args:
        pairs: from a file, whatever it is.
        most: all positions are below.
        what: they are, for the message.
        count: how many they are, if that is known.

    Raises:
        ValueError: they are not ascending pairs, go too far, or are more or fewer than `count`;
            none was written out.
    """
    before, total = -1, 0
    for pair in pairs:
        fits = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not fits or not before < pair[0] <= pair[1] < most:
            raise ValueError(f"{short(what)}: no ascending ranges of numbers below {most:,}")
        before, total = pair[1], total + pair[1] + 1 - pair[0]
    if count is not None and total != count:
        raise ValueError(f"{short(what)}: {total:,} positions, where {count:,} stay")
    found = torch.empty(total, dtype=torch.long, device="cpu")
    place = 0
    for first, last in pairs:
        count = last + 1 - first
        torch.arange(first, last + 1, out=found[place : place + count], device="cpu")
        place += count
    return found


def ranges(indices: list[int]) -> list[list[int]]:
    """Ascending numbers as [first, last] pairs."""
    pairs: list[list[int]] = []
    for i in indices:
        if pairs and pairs[-1][1] == i - 1:
            pairs[-1][1] = i
        else:
            pairs.append([i, i])
    return pairs


def table(plan: PruningPlan) -> str:
    """A plan as people read it: one line a layer, then the totals."""
    width = max((len(name) for name in plan.layers), default=5)
    lines = [f"{'layer':<{width}}  channels   kept            threshold  note"]
    for name, layer in plan.layers.items():
        kept = plan.kept[name].numel()
        bar = "█" * round(8 * kept / layer.channels) + "░" * (8 - round(8 * kept / layer.channels))
        threshold = "—" if layer.threshold is None else f"{layer.threshold:.3g}"
        shown = f"{kept}+{len(layer.constant)}" if layer.constant else f"{kept}"
        numbers = f"{layer.channels:>8}  {shown:>6} {bar} {threshold:>9}"
        lines.append(f"{name:<{width}}  {numbers}  {layer.note}".rstrip())
    channels = sum(layer.channels for layer in plan.layers.values())
    kept_all = sum(kept.numel() for kept in plan.kept.values())
    lines += [
        "",
        f"channels  {channels:,} → {kept_all:,}  (−{1 - kept_all / max(channels, 1):.1%})",
        f"MACs      {plan.macs_before:,} → {plan.macs:,}  (−{plan.flops_reduction:.1%})",
        f"params    {plan.params_before:,} → {plan.params:,}  "
        f"(−{1 - plan.params / max(plan.params_before, 1):.1%})",
        *([] if plan.latency is None else [f"latency   {plan.latency}"]),
        f"method={plan.method}, residual={plan.residual}, fold={plan.fold}; '+1' is a constant "
        "channel",
    ]
    if plan.asked:
        lines.append(f"asked for: {', '.join(f'{k}={v}' for k, v in plan.asked.items())}")
    lines += kept_from_cutting(plan.pinned, plan.pinned_macs)
    for name, why in plan.inexact.items():
        lines.append(f"not exact: {name}: {why}")
    lines += [f"NOTE: {remark}" for remark in plan.remarks]
    if plan.profiled is not None:
        lines += ["", str(plan.profiled)]
    return "\n".join(lines)
