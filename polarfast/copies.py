"""Copies of a model: quick ones, and ones in float64."""

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

#: Values that a copy shares with its original.
SHARED = frozenset((type(None), bool, int, float, str, type, torch.dtype, torch.device))
#: How a module gives its state away unless its class says otherwise.
GETSTATE = getattr(nn.Module, "__getstate__", None)


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


def copy_with(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(model, memo)`, in a fraction of the time: modules are copied here, and only
    what is in them and is no plain value is left to `deepcopy`.
    """
    ordinary = [module for module in model.modules() if _is_ordinary(type(module))]
    for module in ordinary:  # first, so that whatever refers to a module finds its copy
        if id(module) not in memo:
            memo[id(module)] = object.__new__(type(module))
    for module in ordinary:
        state = vars(module) if GETSTATE is None else module.__getstate__()
        copied = {name: _copied(value, memo) for name, value in state.items()}
        kind, new = type(module), memo[id(module)]
        if kind.__setstate__ is nn.Module.__setstate__:  # which is for files of older versions
            vars(new).update(copied)
        else:
            new.__setstate__(copied)
    return copy.deepcopy(model, memo)


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Whether deepcopy would copy the attributes one by one, and do nothing else."""
    return (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and getattr(kind, "__getstate__", None) is GETSTATE
        and not hasattr(kind, "__deepcopy__")
        and kind.__new__ is object.__new__
    )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in SHARED or (kind is tuple and all(type(item) in SHARED for item in value)):
        return value
    found = memo.get(id(value))
    if found is not None:
        return found
    if kind in (OrderedDict, dict, set) and not value:  # a table of hooks, most often
        found = memo[id(value)] = kind()
    elif kind is dict and all(type(key) is str for key in value):
        found = memo[id(value)] = {}
        found.update((key, _copied(item, memo)) for key, item in value.items())
    else:
        found = copy.deepcopy(value, memo)
    return found


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
    return copy_with(model, memo), copies


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
