"""Scaling factors: which γ take part in pruning, and their first values."""

import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, TracingError
from ..inputs import misplaced, unwrap
from ..layers import is_gate, lost_gates
from ..sharding import present_parameters, refuse_overlap, whole
from ..tracing.classes import RESIDUAL_MODES, Channels, trace_channels

#: Reasons that keep a smaller share of the MACs are said without it.
WORTH_SAYING = 0.0005
#: Reasons in `repr`.
SHOWN = 5


class ScalingFactors(Mapping[str, nn.Parameter]):
    """The scaling factors γ of a network, one tensor per layer, by name and in the order in which
    the layers run.

    Attributes:
        pinned: names of BatchNorm weights that cannot take part -> the reason; first those whose
            reason costs most.
        pinned_macs: reason -> the share of the network's MACs that it keeps from being cut: by how
            much the largest share that can be cut (all channels that take part gone, no limits)
            would grow if the channels pinned for this reason could go too.
        others: BatchNorm weights (in a network with gates: gates) that are not in this mapping
            (clamped too with ``clamp="all"``).
        residual: "keep", "expand", "expand-all" or "couple": what happens to channels that meet in
            an addition.

    Args:
        model: the network that the factors are parameters of, so that a training step can notice
            when they no longer are. It is not kept alive.

    Raises:
        ArgumentError: `residual` is none of these.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        pinned: Mapping[str, str] | None = None,
        pinned_macs: Mapping[str, float] | None = None,
        others: Mapping[str, nn.Parameter] | None = None,
        residual: str = "keep",
        model: nn.Module | None = None,
    ) -> None:
        _check_residual(residual)
        self._model = None if model is None else weakref.ref(model)
        self._params = dict(params)
        self._sizes = {name: param.numel() for name, param in self._params.items()}
        self.pinned = dict(pinned or {})
        self.pinned_macs = dict(pinned_macs or {})
        self.others = dict(others or {})
        self.residual = residual
        self._binding: Any = None  # stepping.binding.Binding, of these very parameters

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def numel(self) -> int:
        """n: the number of scaling factors, that is of channels, over all layers."""
        return sum(param.numel() for param in self._params.values())

    def select(self, pattern: str) -> "ScalingFactors":
        """The factors whose name matches a regular expression (`re.search`), e.g. to regularize
        fewer than are pruned.

        Raises:
            ArgumentError: nothing matches, or the pattern is not a regular expression.
        """
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ArgumentError(
                f"pattern={pattern!r} is not a regular expression: {error}"
            ) from error
        chosen = {name: param for name, param in self._params.items() if regex.search(name)}
        if not chosen:
            known = ", ".join(list(self._params)[:4])
            raise ArgumentError(
                f"pattern={pattern!r} matches no scaling factor; names look like: {known}, …"
            )
        rest = {name: param for name, param in self._params.items() if name not in chosen}
        return ScalingFactors(
            chosen,
            pinned=self.pinned,
            pinned_macs=self.pinned_macs,
            others={**rest, **self.others},
            residual=self.residual,
            model=None if self._model is None else self._model(),
        )

    def rebind(self, model: nn.Module) -> "ScalingFactors":
        """The same factors as the parameters that bear their names in `model` now.

        For parameters that were replaced after `pf.scaling_factors`, as `fully_shard` and
        `load_state_dict(assign=True)` do, and for another model of the same layout. Make the
        optimizer and the rebound factors from the same model. Wrappers are looked through.

        Raises:
            ArgumentError: a name is missing in `model` or has another number of channels, or the
                model is in FullyShardedDataParallel.
            ScalingFactorError: two γ have memory in common.
        """
        model = unwrap(model)
        present = present_parameters(model)
        for name, size in (self._sizes | {n: p.numel() for n, p in self.others.items()}).items():
            if name not in present:
                raise ArgumentError(
                    f"{name!r} is no parameter of this model, whose names look like "
                    f"{', '.join(map(repr, list(present)[:2]))}: rebind to the model that the "
                    "factors were found in, or to one built alike"
                    f"{misplaced(self, model) or lost_gates([name])}"
                )
            if present[name].numel() != size:
                raise ArgumentError(
                    f"{name!r} has {present[name].numel()} channels in this model and {size} where "
                    "it was found: call pf.scaling_factors on this model instead"
                )
        found = {name: present[name] for name in self}
        refuse_overlap(found)
        return ScalingFactors(
            found,
            pinned=self.pinned,
            pinned_macs=self.pinned_macs,
            others={name: present[name] for name in self.others},
            residual=self.residual,
            model=model,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A binding belongs to this process and these tensors: a copy makes its own. Nor is it of
        # the network that these were found in.
        return {**self.__dict__, "_binding": None, "_model": None}

    def __repr__(self) -> str:
        line = (
            f"ScalingFactors({len(self)} layers, {self.numel()} channels, "
            f"residual={self.residual!r}, {len(self.pinned)} layers pinned)"
        )
        lines = kept_from_cutting(self.pinned, self.pinned_macs)
        more = len(lines) - SHOWN
        lines = [*lines[:SHOWN], *([f"and for {more} further reasons, see .pinned"] * (more > 0))]
        return "\n  ".join([line, *lines])


def kept_from_cutting(pinned: Mapping[str, str], macs: Mapping[str, float]) -> list[str]:
    """A line for each reason for which layers are pinned: names, the reason, what it costs.

    Args:
        pinned, macs: as `ScalingFactors.pinned` and `pinned_macs`.
    """
    layers: dict[str, list[str]] = {}
    for name, reason in pinned.items():
        layers.setdefault(reason, []).append(name)
    lines = []
    for reason, names in layers.items():
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        share = macs.get(reason, 0.0)
        cost = f", which keeps {share:.1%} of the MACs" if share >= WORTH_SAYING else ""
        lines.append(f"takes no part{cost}: {some}: {reason}")
    return lines


def _check_residual(residual: str) -> None:
    if residual not in RESIDUAL_MODES:
        raise ArgumentError(
            f"residual={residual!r}: choose one of {', '.join(map(repr, RESIDUAL_MODES))}"
        )


def scaling_factors(
    model: nn.Module, example_inputs: Any, residual: str = "keep"
) -> ScalingFactors:
    """Find the scaling factors γ that take part: BatchNorm weights whose norm alone reads the
    channels that it normalizes; for layers with a gate (`add_gates`), the gate instead.

    Args:
        model: any eager network; left exactly as found (modes, buffers, gradients, random state).
            Data-parallel and compiled wrappers are looked through: names are those of the model
            inside.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, e.g.
            `torch.randn(1, 3, 224, 224)`.
        residual: what happens to channels that meet in an addition. "keep": they are left alone.
            "expand": the last convolution of a branch is pruned and what remains is put back at its
            places (the paper's ResNets); parallel branches (RepVGG) lose a channel of their sum
            where all of them do. "expand-all": so does what a shortcut begins with, its last
            convolution, the stem (the paper's MobileNetV2). "couple": channels that are added
            together are kept or removed together.

    Raises:
        ArgumentError: `residual` is none of these, or the model is sharded already.
        TracingError: the model is scripted, does not run on the inputs, or has no normalization
            whose γ can take part.
        ScalingFactorError: two γ have memory in common (views of one tensor).
    """
    _check_residual(residual)
    model = unwrap(model)
    channels = trace_channels(model, example_inputs, residual)
    if not channels.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(channels.pinned.items())[:3])
        raise TracingError(
            "no scaling factor can take part: "
            + (
                why
                or "the network has no BatchNorm with weights; "
                "pf.add_gates puts gates (a factor per channel) where γ is missing"
            )
        )
    if channels.graph.unrun:
        names = [name or "the model itself" for name in channels.graph.unrun]
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        warnings.warn(
            f"pf.scaling_factors: {len(names)} modules did not run on the example inputs: {some}. "
            "Which channels they read is not known, and a slim model can fail there; if they are in"
            " use (another task, another domain), give an example of each use: "
            "example_inputs=[(x, 0), (x, 1)], here and to all that takes example inputs",
            stacklevel=2,
        )
    return factors_of(model, channels)


def factors_of(model: nn.Module, channels: Channels) -> ScalingFactors:
    """The scaling factors of an analyzed model."""
    params = dict(model.named_parameters())
    taking_part = {name: params[name] for name in channels.layers}
    refuse_overlap(taking_part)
    gates = channels.graph.gate_names()  # where there are any, they are clamped and no further γ
    others = {
        name: params[name]
        for name in channels.calls
        if name not in taking_part and (name in gates or not gates)
    }
    return ScalingFactors(
        taking_part,
        pinned=channels.pinned,
        pinned_macs=channels.pinned_macs,
        others=others,
        residual=channels.residual,
        model=model,
    )


def init_scales(scales: Mapping[str, nn.Parameter], value: float = 0.5) -> None:
    """Set every scaling factor to `value` in place (Sec. 3.2: all are initialized to 0.5).

    For networks trained from scratch. In a *trained* network this overwrites what the γ have
    learned, which is warned about (a UserWarning) where the γ of a layer are not all equal: start
    such a network from gates (`add_gates`), or train on from the γ that it has. Setting gates back
    is no reason to warn.

    Raises:
        ArgumentError: `value` is not a finite number >= 0.
    """
    if not isinstance(scales, Mapping):
        raise ArgumentError(
            f"pf.init_scales(scales, value) was given a {type(scales).__name__} as scales: pass "
            "what pf.scaling_factors returned"
        )
    if not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
        raise ArgumentError(
            f"value={value!r}: scaling factors start from a finite number >= 0 (0.5 in the paper)"
        )
    with torch.no_grad():
        gammas = whole({name: p for name, p in scales.items() if not is_gate(name)})
        learned = [name for name, gamma in gammas.items() if _differ(gamma)]
        for param in scales.values():
            param.fill_(value)
    if learned:
        shown = ", ".join(learned[:4])
        more = f" and {len(learned) - 4} more" if len(learned) > 4 else ""
        warnings.warn(
            f"in {len(learned)} of {len(gammas)} layers γ were not all equal, as learned ones are, "
            f"and are now {value:g}: {shown}{more}. What a trained network has learned there is "
            "lost: start it from gates instead, scales = pf.add_gates(model, example_inputs), which"
            " leave its γ alone",
            stacklevel=2,
        )


def _differ(gamma: torch.Tensor) -> bool:
    return not gamma.is_meta and bool((gamma != gamma.flatten()[0]).any())
