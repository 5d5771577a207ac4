"""What the readers of removed channels see: the masked network, run for real."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .tracing import ProjectionCall, call_model

#: A field counts as one constant (or as proportional to another field) up to this share of its
#: largest value: float64 rounding.
TOLERANCE = 1e-11
Fields = dict[int, Tensor]


@dataclass
class ReaderFold:
    """How one reader takes over the constants of the removed channels that it read.

    Attributes:
        weight: the reader's parameter name.
        shift: float64 [C_out], what the constants add to the reader's output.
        columns: constant channel's id -> removed channels' ids it stands for, and each one's
            multiple of the constant channel.
        note: why the fold is not exact; None if it is.
    """

    weight: str
    shift: Tensor | None = None
    columns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    note: str | None = None


@dataclass
class Fold:
    """All constants of a network.

    Attributes:
        readers: by index into `graph.projections`.
        constant: classes that stay as constant channels (in a grouped convolution, one channel per
            group).
    """

    readers: dict[int, ReaderFold] = field(default_factory=dict)
    constant: set[int] = field(default_factory=set)

    def notes(self) -> dict[str, str]:
        """Reader's weight name -> why its fold is not exact."""
        return {reader.weight: reader.note for reader in self.readers.values() if reader.note}


def double_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64, made without a copy in its own dtype on the way."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        if param.is_floating_point():
            double = param.detach().to(torch.float64, copy=True)
            memo[id(param)] = nn.Parameter(double, requires_grad=param.requires_grad)
    return copy.deepcopy(model, memo).double()


def masked_copy(model: nn.Module, kept: dict[str, Tensor], zero_beta: bool) -> nn.Module:
    """A float64 copy of `model` in eval mode with γ (and β if `zero_beta`) zero on the removed
    channels: the reference.
    """
    masked = double_copy(model).eval()
    params = dict(masked.named_parameters())
    with torch.no_grad():
        for name, keep in kept.items():
            gone = torch.ones(params[name].numel(), dtype=torch.bool)
            gone[keep] = False
            gone = gone.to(params[name].device)
            params[name][gone] = 0
            beta = params.get(name.removesuffix("weight") + "bias")
            if zero_beta and beta is not None:
                beta[gone] = 0
    return masked


class _Reads(TorchDispatchMode):
    """Notes what each convolution and linear layer reads in the channels asked for."""

    def __init__(
        self, model: nn.Module, wanted: dict[int, Tensor], calls: list[ProjectionCall]
    ) -> None:
        super().__init__()
        names = {param.data_ptr(): name for name, param in model.named_parameters()}
        self.names, self.wanted, self.fields = names, wanted, Fields()
        self.waiting: dict[str, Iterator[int]] = {}
        order: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            order.setdefault(call.weight, []).append(i)
        self.waiting = {name: iter(indices) for name, indices in order.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        place = {"convolution": (0, 1), "addmm": (1, 2), "mm": (0, 1)}.get(name)
        if place is not None:
            x, weight = args[place[0]], args[place[1]]
            index = next(self.waiting.get(self.names.get(weight.data_ptr(), ""), iter(())), None)
            if index in self.wanted:
                self.fields[index] = x[:, self.wanted[index].to(x.device)].cpu()
        return func(*args, **(kwargs or {}))


def read_fields(
    model: nn.Module, inputs: Any, wanted: dict[int, Tensor], calls: list[ProjectionCall]
) -> Fields:
    """Run `model`; for each call index in `wanted`, what it reads in those input channels: float64
    [N, R, ...].
    """
    reads = _Reads(model, wanted, calls)
    with torch.no_grad(), reads:
        call_model(model, inputs)
    return reads.fields


def level_of(seen: Tensor, again: Tensor) -> tuple[Tensor, str | None]:
    """Each removed channel's value where it is read, [R], taken in the interior; and why it is not
    one value, if so.
    """
    flat = seen.transpose(0, 1).flatten(1)
    scale = flat.abs().max() * TOLERANCE
    level = seen
    for size in seen.shape[2:]:
        level = level.select(2, size // 2)
    level = level.mean(0)
    if seen.shape != again.shape or bool(((seen - again).abs() > scale).any()):
        return level, "depends on the input"
    if bool(((flat - level.unsqueeze(1)).abs() > scale).any()):
        return level, "differs from place to place"
    return level, None


def shift(masked: nn.Module, call: ProjectionCall, positions: Tensor, level: Tensor) -> Tensor:
    """What constant inputs add to each output channel in the interior, float64 [C_out]."""
    weight = masked.get_parameter(call.weight).detach().cpu()
    value = torch.zeros(call.inputs.numel(), dtype=torch.float64)
    value[positions] = level
    if call.transposed:
        weight = weight.flatten(2).mean(2) if weight.dim() > 2 else weight
        per_group = weight.view(call.groups, -1, weight.shape[1]) * value.view(call.groups, -1, 1)
        return per_group.sum(1).flatten()
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    per_group = weight.view(call.groups, -1, weight.shape[1]) * value.view(call.groups, 1, -1)
    return per_group.sum(2).flatten()
