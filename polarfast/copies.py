"""Copies of a model: as it is, in float64, or without its removed channels."""

import copy
from collections.abc import Collection, Iterable, Iterator
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError


def tensors_of_model(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, then all buffers, by name: those of `named_parameters` and `named_buffers`
    in one walk.
    """
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for store, found in ((module._parameters, params), (module._buffers, buffers)):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor
    return params | buffers


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. What the network has kept of a forward pass (`self.features = x`), which
    `copy.deepcopy` refuses while there is a way back through it, is copied without that.

    Args:
        memo: id of an object -> what takes its place in the copy.

    Raises:
        PlanError: the model holds something that cannot be copied; the message names it.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for tensor in _kept(vars(module).values(), set()):
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        made: nn.Module = copy.deepcopy(model, memo)
    except TypeError as error:
        raise PlanError(_uncopied(model, error)) from error
    return made


def _uncopied(model: nn.Module, error: TypeError) -> str:
    """Names what keeps a model from being copied."""
    ours = {"_parameters", "_buffers", "_modules"}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ours:
                continue
            try:
                copy.deepcopy(value)
            except Exception:  # whatever it is
                return (
                    f"{prefix}{'.' * bool(prefix)}{name} is a {type(value).__name__}, which cannot "
                    "be copied with the model, and polarfast works on copies: take it off the "
                    f"model (or give it a __deepcopy__) while channels are removed ({error})"
                )
    return f"the model cannot be copied, and polarfast works on copies: {error}"


def left_behind(model: nn.Module) -> str:
    """What a copy of a model does not take along, as a sentence: layers of functions (which copies
    share), and layers that are not registered; empty if there is nothing.
    """
    registered = {id(module) for module in model.modules()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            where = f"{prefix}{'.' * bool(prefix)}{name}"
            for part in _parts(value, set()):
                if isinstance(part, nn.Module) and id(part) not in registered:
                    return (
                        f"{where} holds a {type(part).__name__} that is not registered, so that it "
                        "is neither trained nor converted with the network: use nn.ModuleList or "
                        "nn.ModuleDict in place of a list or dict"
                    )
                if isinstance(part, FunctionType) and _holds_layers(part):
                    return (
                        f"{where} holds a function ({part.__name__}) that uses layers of where it "
                        "was made, and every copy of the network, slim ones too, goes on using "
                        "those: make it a method of the module, or a functools.partial with the "
                        "layers as its arguments, and register these layers"
                    )
    return ""


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """What an attribute holds, itself or in containers."""
    if not isinstance(value, dict | list | tuple | set):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part, seen)


def _holds_layers(function: FunctionType) -> bool:
    cells = [*getclosurevars(function).nonlocals.values()]
    return any(isinstance(part, (nn.Module, nn.Parameter)) for part in _parts(cells, set()))


def _kept(values: Iterable[Any], seen: set[int]) -> Iterator[Tensor]:
    """Tensors with a way back through them, in containers, too."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            yield from _kept(value.values() if isinstance(value, dict) else value, seen)


def double_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64, made without a copy in its own dtype on the way."""
    return doubled(model)[0].double()  # layers that keep tensors of other kinds convert them there


def doubled(model: nn.Module, hollow: Collection[str] = ()) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of `model` with parameters and buffers in float64, and these by name.

    Args:
        model: the network; left as it is.
        hollow: names of parameters and buffers to put a zero of the right shape in the place of,
            which takes no memory.
    """
    memo: dict[int, Any] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors_of_model(model).items():
        floating = tensor.is_floating_point()
        if name in hollow and floating:
            zero = torch.zeros((), dtype=torch.float64, device=tensor.device)
            double = zero.expand(tensor.shape)
        else:
            dtype = torch.float64 if floating else tensor.dtype
            double = tensor.detach().to(dtype, copy=True)
        if isinstance(tensor, nn.Parameter):
            double = nn.Parameter(double, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = copies[name] = double
    return copy_of(model, memo), copies


def masked_copy(model: nn.Module, kept: dict[str, Tensor], zero_beta: bool) -> nn.Module:
    """A float64 copy of `model` in eval mode with γ (and β if `zero_beta`) or the gate zero on the
    removed channels: the reference.

    Args:
        model: the network; left as it is.
        kept: γ name -> kept channels.
        zero_beta: whether β goes with γ.
    """
    masked, tensors = doubled(model)
    mask(tensors, kept, zero_beta)
    return masked.double().eval()


@torch.no_grad()
def mask(tensors: dict[str, Tensor], kept: dict[str, Tensor], zero_beta: bool) -> None:
    """Set γ (and β) or the gate to zero on the removed channels, in place; as in `masked_copy`."""
    for name, keep in kept.items():
        gone = torch.ones(tensors[name].numel(), dtype=torch.bool, device="cpu")
        gone[keep] = False
        gone = gone.to(tensors[name].device)
        tensors[name][gone] = 0
        owner, _, attribute = name.rpartition(".")
        beta = tensors.get(f"{owner}.bias".lstrip("."))
        if zero_beta and beta is not None and attribute == "weight":  # a gate silences β anyway
            beta[gone] = 0
