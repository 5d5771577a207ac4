"""The oracle of every slim model: the original network with its removed channels masked."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polarfast as pf

TOLERANCE = 1e-10  # of the output's variation over inputs


def masked(model: nn.Module, plan: pf.PruningPlan, zero_beta: bool = False) -> nn.Module:
    """The network with γ or the gate (and β, which a gate silences anyway) 0 on the removed
    channels.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, kept in plan.kept.items():
            gone = torch.ones(model.get_parameter(name).numel(), dtype=torch.bool)
            gone[kept] = False
            model.get_parameter(name)[gone] = 0
            beta = model.get_submodule(name.rpartition(".")[0]).bias
            if zero_beta and beta is not None:
                beta[gone] = 0
    return model


def error(
    reference: nn.Module, slim: nn.Module, shape: tuple[int, ...] = (3, 10, 10), floor: float = 0.0
) -> float:
    """Largest difference as a share of the output's variation over 16 inputs, and of `floor` times
    its size (a small network that dies does not vary).
    """
    x = torch.randn(16, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        a, b = reference(x.clone()), slim.eval()(x.clone())
    return float((a - b).abs().max() / ((a.amax(0) - a.amin(0)).max() + floor * a.abs().max()))


def continued(model: nn.Module, plan: pf.PruningPlan, readers: dict[str, str]) -> nn.Module:
    """In place: removed channels go on in the zero padding around an image, as fold="bias" has it.

    Args:
        model: a masked network.
        plan: what is removed of it.
        readers: convolution -> the norm that writes what it reads.
    """
    for name, norm in readers.items():
        kept = plan.kept.get(f"{norm}.weight")
        conv = model.get_submodule(name)
        if kept is not None and conv.padding != (0, 0):
            gone = torch.ones(conv.in_channels, 1, 1, dtype=torch.bool)
            gone[kept] = False
            conv.register_forward_pre_hook(partial(_pad, gone=gone, border=conv.padding[0]))
            conv.padding = (0, 0)
    return model


def _pad(conv: nn.Module, args: tuple[Tensor], gone: Tensor, border: int) -> Tensor:
    (x,), sides = args, [border] * 4
    return torch.where(gone, F.pad(x, sides, mode="replicate"), F.pad(x, sides))
