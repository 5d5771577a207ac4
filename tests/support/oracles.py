"""What the ops are tested against: none of it is our code.

Penalties as the paper prints them, differentiated by float64 autograd; torch.optim.SGD; numpy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from polarfast.kernels.table import Kind, Penalty, SgdStep

POLARIZATION, L1, DEEPHOYER, CENTERED, SQUARED = Kind
# (kind, per_layer)
REGULARIZERS = [
    (POLARIZATION, False),
    (POLARIZATION, True),
    (L1, False),
    (DEEPHOYER, False),
    (CENTERED, False),
]
# Of Eq. 2: other means, the mean not differentiated through, squares.
VARIANTS = {
    "weighted": Penalty(POLARIZATION, 0.1, 1.2, weighted=True),
    "not through": Penalty(POLARIZATION, 0.1, 1.2, through=False),
    "layer, not through": Penalty(POLARIZATION, 0.1, 1.2, per_layer=True, through=False),
    "squared": Penalty(SQUARED, 0.1, 1.2),
    "squared, layer": Penalty(SQUARED, 0.1, 1.2, per_layer=True),
    "squared, weighted": Penalty(SQUARED, 0.1, 1.2, weighted=True),
    "squared, not through": Penalty(SQUARED, 0.1, 1.2, through=False),
}


def centers(rows: int) -> list[float]:
    """What CENTERED compares the γ of each of so many tensors with, in these tests: between two
    float32 numbers, on a value that γ take, under and above all of them.
    """
    return [(0.3, 0.25, -1.0, 2.0)[row % 4] for row in range(rows)]


def penalty(
    gammas: Sequence[Tensor],
    weights: Sequence[float],
    kind: Kind,
    t: float,
    per_layer: bool = False,
) -> Tensor:
    """R(γ; w): Eq. 2, ‖γ‖₁, Σ ‖γ‖₁²/‖γ‖₂² over the layers, or Eq. 2 about given centers."""
    network_mean = torch.cat([gamma.flatten() for gamma in gammas]).mean()
    total = torch.zeros((), dtype=torch.float64)
    for gamma, weight, center in zip(gammas, weights, centers(len(gammas)), strict=True):
        if kind == POLARIZATION:
            mean = gamma.mean() if per_layer else network_mean
            total = total + weight * (t * gamma.abs() - (gamma - mean).abs()).sum()
        elif kind == CENTERED:
            total = total + weight * (t * gamma.abs() - (gamma - center).abs()).sum()
        elif kind == L1:
            total = total + weight * gamma.abs().sum()
        elif gamma.detach().any():
            total = total + weight * gamma.abs().sum() ** 2 / gamma.square().sum()
    return total


def variant(
    gammas: Sequence[Tensor],
    weights: Sequence[float],
    form: Penalty,
    tilts: Sequence[float],
) -> Tensor:
    """λ·R(γ; w) of one of `VARIANTS`, with a t of its own for each γ tensor."""
    each = [torch.full_like(g, w) for g, w in zip(gammas, weights, strict=True)]
    flat, counted = torch.cat(list(gammas)), torch.cat(each)
    mean = (counted * flat).sum() / counted.sum() if form.weighted else flat.mean()
    total = torch.zeros((), dtype=torch.float64)
    for gamma, weight, tilt in zip(gammas, weights, tilts, strict=True):
        middle = gamma.mean() if form.per_layer else mean
        away = gamma - (middle if form.through else middle.detach())
        away = away.square() if form.kind == SQUARED else away.abs()
        total = total + weight * ((form.t + tilt) * gamma.abs() - away).sum()
    return form.lam * total


def subgradients(
    gammas: Sequence[Tensor],
    weights: Sequence[float],
    kind: Kind,
    t: float,
    per_layer: bool = False,
) -> list[Tensor]:
    """∂R/∂γ by autograd, float64."""
    leaves = [gamma.detach().double().cpu().requires_grad_() for gamma in gammas]
    value = penalty(leaves, weights, kind, t, per_layer)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)
    ]


class PlainTraining:
    """torch.optim.SGD on float64 copies of the γ, with the subgradient added by hand before it
    steps and the clamp by hand after. Frozen γ are in the penalty and not in the optimizer."""

    def __init__(
        self,
        gammas: Sequence[Tensor],
        frozen: Sequence[Tensor],
        weights: Sequence[float],
        penalty: Penalty,
        sgd: SgdStep,
    ) -> None:
        self.gammas = [gamma.detach().double().cpu().clone().requires_grad_() for gamma in gammas]
        self.frozen = [gamma.detach().double().cpu().clone() for gamma in frozen]
        self.penalty = (weights, penalty.kind, penalty.t, penalty.per_layer)
        self.lam = -penalty.lam if sgd.maximize else penalty.lam  # R is minimized in both cases
        self.upper = sgd.upper
        options = sgd._asdict()
        del options["upper"], options["first_step"]
        self.optimizer = torch.optim.SGD(self.gammas, **options)

    def step(self, grads: Sequence[Tensor]) -> None:
        added = subgradients([*self.gammas, *self.frozen], *self.penalty)
        for gamma, grad, extra in zip(self.gammas, grads, added, strict=False):
            gamma.grad = grad.detach().double().cpu() + self.lam * extra
        self.optimizer.step()
        if self.upper is not None:
            with torch.no_grad():
                for gamma in self.gammas:
                    gamma.clamp_(0, self.upper)

    def momenta(self) -> list[Tensor]:
        return [self.optimizer.state[gamma]["momentum_buffer"] for gamma in self.gammas]


def numpy_histogram(gamma: Tensor) -> list[int]:
    """numpy's own count of float32 γ; the caller has skipped the test where numpy is missing."""
    import numpy

    values = gamma.detach().float().cpu().numpy()
    return numpy.histogram(values, bins=100, range=(0, 1))[0].tolist()
