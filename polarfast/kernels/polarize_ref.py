"""The regularizers' subgradients and the steps built on them, in plain torch.

This is the readable statement of the formula: Eq. 2 of "Neuron-level Structured Pruning using
Polarization Regularizer" (NeurIPS 2020), with layer weights w and the mean over all γ of the
network differentiated through:

    R_s(γ) = Σ_i w_i (t |γ_i| − |γ_i − mean|)
    ∂R_s/∂γ_j = w_j (t sgn γ_j − sgn(γ_j − mean)) + 1/n Σ_i w_i sgn(γ_i − mean)

Every regularizer's subgradient is  a_l sgn γ_j + b_l γ_j + c_l sgn(γ_j − m_l) + k_l  with l the
layer of γ_j.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KIND_POLARIZATION = 0
KIND_L1 = 1
KIND_DEEPHOYER = 2


class Coefficients(NamedTuple):
    """a, b, c, k and the mean m of one layer; 0-d float64 tensors or floats."""

    a: Tensor | float
    b: Tensor | float
    c: Tensor | float
    k: Tensor | float
    mean: Tensor | float


def coefficients_ref(
    gammas: Sequence[Tensor],
    weights: Sequence[float],
    kind: int,
    lam: float,
    t: float,
    per_layer: bool,
) -> list[Coefficients]:
    """Coefficients of λ·∂R for each layer, reduced in float64."""
    wide = [gamma.detach().double() for gamma in gammas]
    if kind == KIND_L1:
        return [Coefficients(lam * w, 0.0, 0.0, 0.0, 0.0) for w in weights]
    if kind == KIND_DEEPHOYER:
        return [_deephoyer(gamma, lam * w) for gamma, w in zip(wide, weights, strict=True)]
    if per_layer:
        means = [gamma.mean() for gamma in wide]
        offsets = [
            w * torch.sign(gamma - mean).mean()
            for gamma, w, mean in zip(wide, weights, means, strict=True)
        ]
    else:
        n = sum(gamma.numel() for gamma in wide)
        mean = torch.stack([gamma.sum() for gamma in wide]).sum() / n
        signs = [w * torch.sign(gamma - mean).sum() for gamma, w in zip(wide, weights, strict=True)]
        means = [mean] * len(wide)
        offsets = [torch.stack(signs).sum() / n] * len(wide)
    return [
        Coefficients(lam * t * w, 0.0, -lam * w, lam * offset, mean)
        for w, offset, mean in zip(weights, offsets, means, strict=True)
    ]


def _deephoyer(gamma: Tensor, strength: float) -> Coefficients:
    """‖γ‖₁²/‖γ‖₂² of one layer; a layer of zeros, where it has no derivative, gets 0."""
    norm, squares = gamma.abs().sum(), gamma.square().sum()
    if squares == 0:
        return Coefficients(0.0, 0.0, 0.0, 0.0, 0.0)
    a = 2 * strength * norm / squares
    return Coefficients(a, -a * norm / squares, 0.0, 0.0, 0.0)


def subgradient_ref(gamma: Tensor, at: Coefficients) -> Tensor:
    """λ·∂R/∂γ of one layer, in float64."""
    x = gamma.detach().double()
    return at.a * torch.sign(x) + at.b * x + at.c * torch.sign(x - at.mean) + at.k


@torch.no_grad()
def add_subgradient_ref(
    gammas: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[float],
    kind: int,
    lam: float,
    t: float,
    per_layer: bool,
    grad_scale: Tensor | None = None,
) -> None:
    """grads[i] += grad_scale · λ · ∂R/∂gammas[i]; gammas beyond len(grads) are frozen ones."""
    scale = 1.0 if grad_scale is None else grad_scale.double()
    found = coefficients_ref(gammas, weights, kind, lam, t, per_layer)
    for gamma, grad, at in zip(gammas, grads, found, strict=False):
        grad.copy_(grad.double() + scale * subgradient_ref(gamma, at))


@torch.no_grad()
def clamp_ref(gammas: Sequence[Tensor], upper: float, found_inf: Tensor | None = None) -> None:
    """γ ← min(max(γ, 0), upper), unless found_inf is not 0."""
    for gamma in gammas:
        clamped = gamma.clamp(0, upper)
        gamma.copy_(clamped if found_inf is None else torch.where(found_inf == 0, clamped, gamma))


@torch.no_grad()
def sgd_step_ref(
    gammas: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    frozen: Sequence[Tensor],
    weights: Sequence[float],
    kind: int,
    lam: float,
    t: float,
    per_layer: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    upper: float | None,
    first_step: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Subgradient, torch.optim.SGD's step and clamp, in that order.

    λ·R is minimized under `maximize` too.
    """
    scale = 1.0 if grad_scale is None else grad_scale.double()
    go = None if found_inf is None else found_inf == 0
    found = coefficients_ref([*gammas, *frozen], weights, kind, lam, t, per_layer)
    for i, (gamma, grad) in enumerate(zip(gammas, grads, strict=True)):
        d = grad.double() / scale
        d = (-d if maximize else d) + subgradient_ref(gamma, found[i]) + weight_decay * gamma
        if momentum != 0:
            held = d if first_step else momentum * momenta[i].double() + (1 - dampening) * d
            momenta[i].copy_(held if go is None else torch.where(go, held, momenta[i].double()))
            d = d + momentum * held if nesterov else held
        moved = gamma.double() - lr * d
        if upper is not None:
            moved = moved.clamp(0, upper)
        gamma.copy_(moved if go is None else torch.where(go, moved, gamma.double()))
