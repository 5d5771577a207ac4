"""What the readers of removed channels see: the masked network, run for real."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import PlanError
from .tracing import ProjectionCall, call_model, plain_eager

#: A field counts as one constant (or as proportional to another field) up to this share of its
#: largest value: float64 rounding.
TOLERANCE = 1e-11
Fields = dict[int, Tensor]


@dataclass
class ReaderFold:
    """How one reader takes over the constants of the removed channels that it read.

    Attributes:
        weight: the reader's parameter name.
        sink: the tensor that takes up `shift`; None: nothing does (it is cancelled, or it is lost).
        shift: float64 [C_out], what the constants add to the reader's output.
        shifted: input positions whose constants `shift` stands for.
        columns: constant channel's position -> removed channels' positions that it stands for, and
            each one's multiple of the constant channel.
        note: why the fold is not exact; None if it is.
    """

    weight: str
    sink: str | None = None
    shift: Tensor | None = None
    shifted: Tensor | None = None
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
    """A float64 copy of `model` in eval mode with γ (and β if `zero_beta`) or the gate zero on the
    removed channels: the reference.
    """
    masked = double_copy(model).eval()
    params = dict(masked.named_parameters())
    with torch.no_grad():
        for name, keep in kept.items():
            gone = torch.ones(params[name].numel(), dtype=torch.bool, device="cpu")
            gone[keep] = False
            gone = gone.to(params[name].device)
            params[name][gone] = 0
            owner, _, attribute = name.rpartition(".")
            beta = params.get(f"{owner}.bias".lstrip("."))
            if zero_beta and beta is not None and attribute == "weight":  # a gate silences β anyway
                beta[gone] = 0
    return masked


class _Projections(TorchDispatchMode):
    """Meets each convolution and linear layer of a model as the call it is in the traced graph."""

    def __init__(self, model: nn.Module, calls: list[ProjectionCall]) -> None:
        super().__init__()
        self.names = {param.data_ptr(): name for name, param in model.named_parameters()}
        self.copies: list[Tensor] = []  # kept, so that no other tensor gets their addresses
        order: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            order.setdefault(call.weight, []).append(i)
        self.waiting: dict[str, Iterator[int]] = {n: iter(indices) for n, indices in order.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # here composite operators arrive whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func.overloadpacket.__name__
        place = {"convolution": (0, 1), "addmm": (1, 2), "mm": (0, 1)}.get(name)
        if place is None:
            out = func(*args, **kwargs)
            if name in ("clone", "_to_copy") and args[0].data_ptr() in self.names:
                self.names[out.data_ptr()] = self.names[args[0].data_ptr()]
                self.copies.append(out)
            return out
        weight = args[place[1]]
        index = next(self.waiting.get(self.names.get(weight.data_ptr(), ""), iter(())), None)
        if index is None:
            return func(*args, **kwargs)
        x = self.read(index, args[place[0]])
        args = (*args[: place[0]], x, *args[place[0] + 1 :])
        return self.write(index, func(*args, **kwargs))

    def read(self, index: int, x: Tensor) -> Tensor:
        """What the call is to read instead of `x`."""
        return x

    def write(self, index: int, out: Tensor) -> Tensor:
        """What the call is to return instead of `out`."""
        return out


class _Reads(_Projections):
    """Notes what each call reads in the channels asked for."""

    def __init__(
        self, model: nn.Module, wanted: dict[int, Tensor], calls: list[ProjectionCall]
    ) -> None:
        super().__init__(model, calls)
        self.wanted, self.fields = wanted, Fields()

    def read(self, index: int, x: Tensor) -> Tensor:
        if index in self.wanted:
            self.fields[index] = x[:, self.wanted[index].to(x.device)].cpu()
        return x


class AsFolded(_Projections):
    """Lets each reader whose fold is not exact see what the plan says it sees: instead of the
    removed channels' constants, their interior value.
    """

    def __init__(self, model: nn.Module, fold: Fold, calls: list[ProjectionCall]) -> None:
        super().__init__(model, calls)
        self.readers = {i: reader for i, reader in fold.readers.items() if reader.note}

    def read(self, index: int, x: Tensor) -> Tensor:
        reader = self.readers.get(index)
        if reader is None or reader.shifted is None:
            return x
        return x.index_fill(1, reader.shifted.to(x.device), 0.0)

    def write(self, index: int, out: Tensor) -> Tensor:
        reader = self.readers.get(index)
        if reader is None or reader.shift is None:
            return out
        shift = reader.shift.to(out.device)
        return out + shift.view(1, -1, *[1] * (out.dim() - 2))


def run_double(model: nn.Module, inputs: Any) -> Any:
    """A float64 model on float64 inputs.

    Raises:
        PlanError: the network's code asks for another dtype.
    """
    try:
        with plain_eager():
            return call_model(model, inputs)
    except RuntimeError as error:
        if "dtype" not in str(error) and "same type" not in str(error):
            raise
        raise PlanError(
            f"the network cannot run in float64, in which removed channels are worked out: {error}."
            " Let its code take the dtype from its input (x.to(weight.dtype), not x.float())"
        ) from error


def read_fields(
    model: nn.Module, inputs: Any, wanted: dict[int, Tensor], calls: list[ProjectionCall]
) -> Fields:
    """Run `model`; for each call index in `wanted`, what it reads in those input channels: float64
    [N, R, ...].
    """
    with _Reads(model, wanted, calls) as reads:
        run_double(model, inputs)
    for index, seen in reads.fields.items():
        if not bool(seen.isfinite().all()):
            raise PlanError(
                f"{calls[index].weight} reads NaN or inf in a removed channel, on random inputs "
                "between the example inputs' smallest and largest value: use example inputs like "
                "the real ones, and check that training has not diverged"
            )
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


def put_interior(
    masked: nn.Module,
    call: ProjectionCall,
    reader: ReaderFold,
    positions: Tensor,
    level: Tensor,
    problem: str | None,
) -> None:
    """Fold one value for each removed channel, its own in the interior; `problem`: why it is not
    the same everywhere, if it is not.
    """
    reader.shifted, reader.note = positions, problem
    if reader.sink is not None:
        reader.shift = _shift(masked, call, positions, level)


def _shift(masked: nn.Module, call: ProjectionCall, positions: Tensor, level: Tensor) -> Tensor:
    """What constant inputs add to each output channel in the interior, float64 [C_out]."""
    weight = masked.get_parameter(call.weight).detach().cpu()
    value = torch.zeros(call.inputs.numel(), dtype=torch.float64, device="cpu")
    value[positions] = level
    if call.transposed:
        weight = weight.flatten(2).mean(2) if weight.dim() > 2 else weight
        per_group = weight.view(call.groups, -1, weight.shape[1]) * value.view(call.groups, -1, 1)
        return per_group.sum(1).flatten()
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    per_group = weight.view(call.groups, -1, weight.shape[1]) * value.view(call.groups, 1, -1)
    return per_group.sum(2).flatten()
