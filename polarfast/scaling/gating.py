"""`add_gates`: a factor 1 after chosen layers, to be regularized and clamped instead of γ."""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..inputs import unwrap
from ..layers import Gated, drop_gate, gate_name, gated_modules, gated_type, open_gate, own_forward
from ..tracing.classes import Channels, trace_channels
from .factors import ScalingFactors, factors_of

Reasons = dict[str, str]


def add_gates(
    model: nn.Module,
    example_inputs: Any,
    where: str | Collection[str] | None = None,
    residual: str = "keep",
) -> ScalingFactors:
    """Put a gate, one more factor per channel, after layers of a network, in place.

    A gate is a parameter `<layer>.gate` of ones, shape [C_out]; what the network computes stays the
    same to the bit. It is how a network starts that is trained already: γ keep what they have
    learned, whatever their size and sign. It is also how layers without BatchNorm are pruned: a
    VGG's convolutions, the hidden units of the MLPs in ConvNeXt, ViT and Swin. The paper's
    MobileNetV2 uses gates too. Regularize, clamp, plan and prune by the result as by γ: `slim`
    multiplies every gate into its layer, so that the slim model is made of the original's classes
    again. Unlike γ = 0, a gate of 0 silences the bias (β) too: a removed channel is act(0), which
    is 0 for most activations and is folded for the others.

    Gates go on BatchNorm1d to 3d, SyncBatchNorm, Conv1d to 3d, ConvTranspose1d to 3d and Linear (on
    inputs of any rank), and on classes derived from these. From then on `scaling_factors` finds the
    gates in place of the γ of the gated layers, and ``clamp="all"`` means all gates. Build the
    optimizer after this (and wrappers for data parallelism; convert to SyncBatchNorm before it).

    Args:
        model: any eager network, not yet wrapped; only classes of the gated layers change.
        example_inputs: as for `scaling_factors`.
        where: None: every BatchNorm that can take part or, if there is none, every convolution and
            linear layer that can. A regular expression (`re.search`) on module names: of all these
            layers, with or without BatchNorm, those that match. So in a network that mixes both,
            ``where=r"mlp"`` gates the MLPs alone and ``where="."`` gates all. A collection of
            module names: exactly these.
        residual: as for `scaling_factors`.

    Returns:
        The gates as scaling factors. Layers that a BatchNorm reads have none: it would cancel
        the factor.

    Raises:
        ArgumentError: a name or pattern stands for no layer, or for one that cannot take part or
            has a gate already; the model is unchanged.
        TracingError: the model cannot be traced.
    """
    if unwrap(model) is not model:
        raise ArgumentError(
            f"the model is in a {type(model).__name__}: add gates to the network itself, then "
            "wrap it, so that the wrapper knows them"
        )
    channels = trace_channels(model, example_inputs, residual)
    names = _chosen(model, channels, where)
    strict = where is not None and not isinstance(where, str)
    for name in names:
        open_gate(model.get_submodule(name))
    try:
        channels, names = _settle(model, example_inputs, residual, names, strict)
    except BaseException:
        for name in names:
            module = model.get_submodule(name)
            if isinstance(module, Gated):
                drop_gate(module)
        raise
    found = factors_of(model, channels)
    gates = {name: gate for name, gate in found.items() if name in channels.graph.gate_names()}
    return ScalingFactors(
        gates,
        pinned=found.pinned,
        pinned_macs=found.pinned_macs,
        others=found.others,
        residual=residual,
        model=model,
    )


def _settle(
    model: nn.Module, example_inputs: Any, residual: str, names: list[str], strict: bool
) -> tuple[Channels, list[str]]:
    """Take back gates that cannot take part (if `strict`: refuse them) until all others do."""
    reasons: Reasons = {}
    while names:
        channels = trace_channels(model, example_inputs, residual)
        bad = {n: why for n in names if (why := _why_bad(model, channels, n)) is not None}
        if not bad:
            return channels, names
        reasons |= bad
        if strict:
            break
        for name in bad:
            module = model.get_submodule(name)
            assert isinstance(module, Gated)
            drop_gate(module)
        names = [name for name in names if name not in bad]
    raise _refusal(reasons)


def _why_bad(model: nn.Module, channels: Channels, name: str) -> str | None:
    """Why a gate that was put on a module cannot take part; None if it can."""
    gate = gate_name(name)
    if gate not in channels.layers:
        return channels.pinned.get(gate, "it does not run on the example inputs")
    call = channels.calls[gate]
    if call.normalizes or own_forward(model.get_submodule(name)):
        return None
    written = None if call.source is None else channels.graph.projections[call.source].weight
    if written == gate.removesuffix("gate") + "weight":
        return None
    return "its class does more to its output than torch's own, so that no gate can be folded in"


def _chosen(model: nn.Module, channels: Channels, where: str | Collection[str] | None) -> list[str]:
    """Names of the modules that are to get gates, in the order in which they run."""
    norms = [
        _owner(str(call.weight))
        for name, call in channels.calls.items()
        if name in channels.layers and call.gate is None
    ]
    normalized = _normalized(channels)
    bare = list(
        dict.fromkeys(
            _owner(call.weight)
            for call in channels.graph.projections
            if not call.depthwise and _owner(call.weight) not in normalized
        )
    )
    bare = [name for name in bare if _obstacle(model, name) is None]
    if where is None:
        already = [name for name, _ in gated_modules(model)]
        if already:
            raise ArgumentError(
                f"the model has gates already ({already[0]!r} and {len(already) - 1} more): "
                "pass where= to add others"
            )
        chosen = norms or bare
        if not chosen:
            raise _refusal({_owner(name): why for name, why in channels.pinned.items()})
    elif isinstance(where, str):
        chosen = _matching(model, channels, where, [*norms, *bare])
    else:
        chosen = _named(model, where)
        cancelled = [name for name in chosen if name in normalized]
        if cancelled:
            raise _refusal(
                {name: "a normalization reads it and cancels a factor" for name in cancelled}
            )
    obstacles = {name: why for name in chosen if (why := _obstacle(model, name)) is not None}
    if obstacles:
        raise _refusal(obstacles)
    return chosen


def _matching(
    model: nn.Module, channels: Channels, pattern: str, candidates: list[str]
) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"where={pattern!r} is not a regular expression: {error}") from error
    twice = [name for name, _ in gated_modules(model) if regex.search(name)]
    if twice:
        raise _refusal({name: "has a gate already" for name in twice})
    chosen = [name for name in candidates if regex.search(name)]
    if not chosen:
        pinned = {_owner(name): why for name, why in channels.pinned.items()}
        reasons = {name: why for name, why in pinned.items() if regex.search(name)}
        if reasons:
            raise _refusal(reasons)
        some = ", ".join(map(repr, candidates[:3])) or "there are none"
        raise ArgumentError(f"where={pattern!r} matches no layer that can have a gate ({some}, …)")
    return chosen


def _named(model: nn.Module, where: Collection[str]) -> list[str]:
    canonical = {id(module): name for name, module in model.named_modules()}
    chosen: dict[str, None] = {}
    unknown = []
    for name in where:
        try:
            chosen[canonical[id(model.get_submodule(name))]] = None
        except AttributeError:
            unknown.append(name)
    if unknown or not chosen:
        raise ArgumentError(
            f"where names no module: {', '.join(map(repr, unknown)) or 'it is empty'}; give names "
            "of layers as in model.named_modules(), without '.weight'"
        )
    order = list(canonical.values())
    return sorted(chosen, key=order.index)


def _normalized(channels: Channels) -> set[str]:
    """Convolutions and linear layers whose output a normalization reads, directly or through
    operators that keep channels.
    """
    raw = channels.graph.labels()
    read = channels.graph.mask()
    for norm in channels.graph.norms:
        if norm.normalizes:
            read[raw[norm.inputs]] = True
    read[raw[0]] = False
    return {
        _owner(call.weight)
        for call in channels.graph.projections
        if bool(read[raw[call.outputs]].any())
    }


def _obstacle(model: nn.Module, name: str) -> str | None:
    """Why a module can have no gate, whatever its channels; None if it can."""
    module = model.get_submodule(name)
    if isinstance(module, Gated):
        return "has a gate already"
    if gated_type(type(module)) is None:
        known = "BatchNorm1d to 3d, SyncBatchNorm, Conv1d to 3d, ConvTranspose1d to 3d, Linear"
        return f"is a {type(module).__name__}; gates go on torch's {known}"
    if not isinstance(module.weight, torch.Tensor):
        return "has no weight and bias that could take up a gate: make it affine=True"
    if hasattr(module, "gate"):
        return "has an attribute 'gate' of its own"
    own = {id(param) for param in module.parameters(recurse=False)}
    for other_name, other in model.named_modules():
        if other is not module and own & {id(p) for p in other.parameters(recurse=False)}:
            return f"shares a parameter with {other_name!r}, which the gate would change too"
    return None


def _refusal(reasons: Reasons) -> ArgumentError:
    shown = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:4])
    more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    return ArgumentError(
        f"no gate can be put here: {shown or 'no layer can take part'}{more}. Leave these layers "
        "out of where=, or choose another residual="
    )


def _owner(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]
