"""The γ work of a training step as dispatcher ops on lists of tensors: what torch.compile sees.

Training loops go through kernels/table.py, which calls the same C++ without the lists. On devices
other than the CPU these ops run their eager reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .polarize_ref import (
    KIND_DEEPHOYER,
    KIND_L1,
    KIND_POLARIZATION,
    add_subgradient_ref,
    clamp_ref,
    sgd_step_ref,
)
from .registration import register

__all__ = [
    "KIND_DEEPHOYER",
    "KIND_L1",
    "KIND_POLARIZATION",
    "add_subgradient_",
    "clamp_",
    "sgd_step_",
]


def add_subgradient_(
    gammas: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[float],
    kind: int,
    lam: float,
    t: float,
    per_layer: bool = False,
    grad_scale: Tensor | None = None,
) -> None:
    """grads[i] += grad_scale · λ · ∂R/∂gammas[i] (Eq. 2 of the paper and its rivals).

    Args:
        gammas: all γ tensors; those beyond len(grads) are frozen, and counted in every sum.
        grads: gradients of the first γ, in order.
        weights: layer weight of each γ tensor; empty: all 1.
        kind: KIND_POLARIZATION, KIND_L1 or KIND_DEEPHOYER.
        per_layer: the mean of each layer in place of the mean of all.
    """
    torch.ops.polarfast.add_subgradient_(
        gammas, grads, weights, kind, lam, t, per_layer, grad_scale
    )


def clamp_(gammas: Sequence[Tensor], upper: float, found_inf: Tensor | None = None) -> None:
    """γ ← min(max(γ, 0), upper), unless found_inf is not 0."""
    torch.ops.polarfast.clamp_(gammas, upper, found_inf)


def sgd_step_(
    gammas: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    frozen: Sequence[Tensor],
    weights: Sequence[float],
    kind: int,
    lam: float,
    t: float,
    per_layer: bool = False,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    upper: float | None = None,
    first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Subgradient, a step of torch.optim.SGD, and clamp of `gammas`, in one pass.

    Args:
        momenta: momentum buffers of `gammas`; empty when momentum is 0.
        frozen: further γ, counted in every sum and not moved; `weights` go on to these.
        upper: γ end in [0, upper]; None: they are not clamped.
        first_step: the momentum buffers hold nothing yet; they are set to the gradient.
    """
    torch.ops.polarfast.sgd_step_(
        gammas,
        grads,
        momenta,
        frozen,
        weights,
        kind,
        lam,
        t,
        per_layer,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        upper,
        first_step,
        grad_scale,
        found_inf,
    )


def _nothing(*_: object) -> None:
    """The fake of an op that returns nothing."""


register("add_subgradient_", fake=_nothing, elsewhere=add_subgradient_ref)
register("clamp_", fake=_nothing, elsewhere=clamp_ref)
register("sgd_step_", fake=_nothing, elsewhere=sgd_step_ref)
