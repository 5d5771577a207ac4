"""Copies of a model: quick ones, and ones in float64."""

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


def copy_with(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(model, memo)`, in a fraction of the time: nearly all of it goes into the empty
    tables of hooks, a dozen in every module, which are made here instead.
    """
    for module in model.modules():
        for table in vars(module).values():
            if type(table) is OrderedDict and not table:
                memo[id(table)] = OrderedDict()
    return copy.deepcopy(model, memo)


def double_copy(model: nn.Module, hollow: Collection[str] = ()) -> nn.Module:
    """A copy of `model` in float64, made without a copy in its own dtype on the way.

    Args:
        model: the network; left as it is.
        hollow: names of parameters and buffers to put a zero of the right shape in the place of,
            which takes no memory.
    """
    memo: dict[int, Any] = {}
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        if name in hollow:
            zero = torch.zeros((), dtype=torch.float64, device=tensor.device)
            double = zero.expand(tensor.shape)
        else:
            double = tensor.detach().to(torch.float64, copy=True)
        if isinstance(tensor, nn.Parameter):
            double = nn.Parameter(double, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = double
    copied = copy_with(model, memo)
    # Layers that keep tensors of other kinds convert them when they are asked to.
    return copied if hollow else copied.double()


@torch.no_grad()
def masked_copy(
    model: nn.Module, kept: dict[str, Tensor], zero_beta: bool, hollow: Collection[str] = ()
) -> nn.Module:
    """A float64 copy of `model` in eval mode with γ (and β if `zero_beta`) or the gate zero on the
    removed channels: the reference.

    Args:
        model: the network; left as it is.
        kept: γ name -> kept channels.
        zero_beta: whether β goes with γ.
        hollow: as in `double_copy`.
    """
    masked = double_copy(model, hollow).eval()
    params = dict(masked.named_parameters())
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
