"""Which factors go: their order over all layers, and the border in each between them and the rest.

What counts is where a factor will be. Momentum carries it on after it is pushed no more, so one
that will come to rest at 0 is gone, whatever is wanted; and one push carries along whatever lies
close to the factors that it is meant for.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

#: By what part of it a factor that is to go lies below those of its layer that stay. Equal ones,
#: as at the clamp, would never part by themselves.
APART = 0.05


def resting(
    gammas: Mapping[str, Tensor], far: Mapping[str, Tensor], clamped: bool
) -> dict[str, Tensor]:
    """Where momentum takes the sizes of factors, name -> [C]. Below 0 a clamp holds them there;
    without one they end on the other side.

    Args:
        far: how far it carries them towards 0, of the layers that have momentum.
    """
    ends = {name: gamma - far.get(name, 0.0) for name, gamma in gammas.items()}
    return ends if clamped else {name: end.abs() for name, end in ends.items()}


def places(values: Tensor, then: Tensor) -> Tensor:
    """The place of each value in the order of all, from 1; equal ones by what comes `then`."""
    order = then.argsort(stable=True)
    order = order[values[order].argsort(stable=True)]
    found = torch.empty_like(values)
    found[order] = torch.arange(1, values.numel() + 1).to(values)
    return found


def between(order: Tensor, count: int) -> float:
    """A border with `count` of these sorted values under it, and all that are equal to them."""
    below = float(order[count - 1]) if count else -1.0
    above = float(order[count]) if count < order.numel() else below + 1.0
    if below < above:
        return (below + min(above, below + 1.0)) / 2
    return below


def center_of(gamma: Tensor, going: Tensor, border: float) -> float:
    """The center of a layer: at the border, and clearly below every factor that stays.

    Args:
        gamma: [C]. going: bool [C]. border: in units of gamma.
    """
    stay = gamma[~going]
    return min(border, (1 - APART / 2) * float(stay.min())) if stay.numel() else border


def apart(
    gammas: Mapping[str, Tensor], going: Mapping[str, Tensor], centers: tuple[float, ...]
) -> dict[str, tuple[Tensor, float]]:
    """Which factors are to go and yet lie above their layer's center, bool [C], and a size just
    below it, which is less by `APART` at most; of layers that have such factors.
    """
    found = {}
    for (name, gamma), center in zip(gammas.items(), centers, strict=True):
        near = going[name] & (gamma > center)
        if near.any():
            found[name] = (near, center * (1 - APART) / (1 - APART / 2))
    return found
