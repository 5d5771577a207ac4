"""Sparsity regularizers: what is added to the loss, and the numbers that the kernels need for it.

Polarization: "Neuron-level Structured Pruning using Polarization Regularizer" (NeurIPS 2020).
"""

import math
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ArgumentError, ScalingFactorError
from ..kernels.table import Kind, Penalty
from ..sharding import whole

if TYPE_CHECKING:
    from ..scaling.factors import ScalingFactors


#: Names, what their λ is multiplied with, what is added to their t.
_Group = tuple[re.Pattern[str], float, float]


def _finite(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(f"{name}={value!r}: give a finite number")
    return float(value)


def _layer_weights(weights: Mapping[str, float] | None) -> Mapping[str, float] | None:
    """A checked, read-only copy: a changed weight has to arrive as a new mapping to be noticed."""
    if weights is None:
        return None
    checked = {name: _finite(f"weights[{name!r}]", value) for name, value in weights.items()}
    for name, value in checked.items():
        if value < 0:
            raise ArgumentError(f"weights[{name!r}]={value!r}: a layer weight cannot be negative")
    return MappingProxyType(checked)


class Regularizer:
    """Base class: λ·R_s(γ), its subgradient as a kernel kind, and the range γ is clamped to.

    `lam`, `t`, `upper` and `weights` may be assigned between steps; `pf.step` and an attached
    optimizer use the values of the moment.

    Attributes:
        kind: which formula the kernels apply.
        lam: λ ≥ 0, strength.
        t: balance of the two terms of polarization (0 where the formula has no t).
        upper: after each optimizer step γ is clamped to [0, upper]; None: no clamp.
        per_layer: the mean γ̄ is taken over each layer instead of over all n factors.
        weighted: in the mean over all, each γ counts for its layer's weight.
        through: the mean is differentiated through.
        clamp: "scales" clamps the factors that take part; "all" clamps `scales.others` too.
        weights: name of γ -> w_l ≥ 0, the weight of that layer in the sum; absent names weigh 1.
        centers: c_l of each layer of the step, in order, where the kind goes by them.
        groups: layers with a λ and t of their own, if any; replaced, never changed.
    """

    kind: Kind
    centers: tuple[float, ...] | None = None
    weighted: bool = False
    through: bool = True
    groups: list[_Group] | None = None

    def __init__(
        self,
        lam: float,
        t: float = 0.0,
        upper: float | None = None,
        per_layer: bool = False,
        clamp: str = "scales",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if clamp not in ("scales", "all"):
            raise ArgumentError(f"clamp={clamp!r}: choose 'scales' or 'all'")
        self.lam = lam
        self.t = t
        self.upper = upper
        self.weights = weights
        self.per_layer = per_layer
        self.clamp = clamp

    @property
    def lam(self) -> float:
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        if _finite("lam", value) < 0:
            raise ArgumentError(f"lam={value!r}: the strength λ cannot be negative")
        self._lam = float(value)

    @property
    def t(self) -> float:
        return self._t

    @t.setter
    def t(self, value: float) -> None:
        self._t = _finite("t", value)

    @property
    def upper(self) -> float | None:
        return self._upper

    @upper.setter
    def upper(self, value: float | None) -> None:
        if value is not None and _finite("upper", value) <= 0:
            raise ArgumentError(f"upper={value!r}: γ live in [0, upper], so upper must be above 0")
        self._upper = None if value is None else float(value)

    @property
    def weights(self) -> Mapping[str, float] | None:
        return self._weights

    @weights.setter
    def weights(self, value: Mapping[str, float] | None) -> None:
        self._weights = _layer_weights(value)

    def weights_of(self, names: Collection[str]) -> tuple[float, ...] | None:
        """w_l of each layer, in the order of `names`; None where every layer weighs 1.

        Raises:
            ArgumentError: a weight is given for a name that is not among `names`.
        """
        if self._weights is None:
            return None
        unknown = [name for name in self._weights if name not in names]
        if unknown:
            raise ArgumentError(
                f"weights[{unknown[0]!r}]: no such scaling factor here; "
                f"names look like {', '.join(map(repr, list(names)[:2]))}"
            )
        return tuple(self._weights.get(name, 1.0) for name in names)

    def tilts_of(self, names: Collection[str]) -> tuple[float, ...] | None:
        """What is added to t in each layer, in the order of `names`; None where nothing is."""
        return None

    def penalty(self) -> Penalty:
        """What the kernels need to know at this moment."""
        return Penalty(self.kind, self.lam, self.t, self.per_layer, self.weighted, self.through)

    def value(self, scales: Mapping[str, Tensor]) -> Tensor:
        """λ·R_s(γ), for logging: the penalty itself, in the unit of the loss.

        It is the loss that is penalized, not the gradient: `pf.step` adds exactly the gradient of
        this value to γ.grad. It knows channels, not MACs (weigh layers by their MACs through
        `weights`). Polarization's value is often negative, and falls as the γ part into two
        groups: that is normal.

        Args:
            scales: name -> γ of any shape, on one device. Sharded ones (`fully_shard`) are gathered
                in one collective, so every process must ask.

        Returns:
            0-d tensor, differentiable, accumulated in float64; float64 for float64 γ, else float32.

        Raises:
            ScalingFactorError: `scales` is empty.
        """
        if not scales:
            raise ScalingFactorError("there are no scaling factors: R_s of nothing is not defined")
        layers = [gamma.reshape(-1).double() for gamma in whole(scales).values()]
        weights = self.weights_of(scales) or (1.0,) * len(layers)
        dtype = next(iter(scales.values())).dtype
        tilts = self.tilts_of(scales) or (0.0,) * len(layers)
        value = self.penalty().lam * self._sum(layers, weights, tilts)
        return value.to(torch.promote_types(dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        """What changes by itself in training, as plain numbers; {} where nothing does."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""

    def steer(
        self,
        scales: "ScalingFactors",
        optimizer: Optimizer,
        scale: Tensor | None = None,
    ) -> None:
        """Called at each training step, gradients in place, before λ·∂R_s is added to them: for
        regularizers that change as γ do. This one does not.

        Args:
            scales: the factors that the step is for.
            optimizer: whose step it is.
            scale: what the gradients are still multiplied with under AMP; None: nothing.
        """

    def settle(self, scales: "ScalingFactors") -> None:
        """Called at the end of each training step, after the clamp."""

    @property
    def shrunk(self) -> bool:
        """Whether channels at 0 have been taken out of the network that trains."""
        return False

    def remark(self) -> str | None:
        """What whoever plans a pruning now should know about the training; None: nothing."""
        return None

    def _sum(
        self, layers: list[Tensor], weights: tuple[float, ...], tilts: tuple[float, ...]
    ) -> Tensor:
        """R_s of 1-D float64 layers."""
        raise NotImplementedError

    def __repr__(self) -> str:
        t = f", t={self.t:g}" if isinstance(self, Polarization) else ""
        return f"{type(self).__name__}(lam={self.lam:g}{t}, upper={self.upper})"


class Polarization(Regularizer):
    """λ·Σ_i w·( t·|γ_i| − |γ_i − γ̄| ), Eq. 2 of the paper: pushes each γ to 0 or to `upper`.

    γ̄ is the mean of all γ of the network and is differentiated through. By Theorem 3.2, a share
    ρ = 1/2 − t/4 of the factors ends at `upper` where the task has no say.

    What follows `weights` are options of the authors' program, off by default.

    Args:
        lam: λ ≥ 0, strength; 3e-5 to 1e-4 in the paper's recipes.
        t: balance, in [-2, 2]; the larger, the more γ go to 0. 1.0 to 1.5 in the paper's recipes.
        upper: a; γ are clamped to [0, a] after each optimizer step. None: no clamp.
        mean: "global" (the paper): γ̄ over all n factors; "layer": over each layer; "weighted": over
            all, each counting for its layer's weight.
        clamp: "scales", or "all" to clamp every BatchNorm weight as the paper's recipes do.
        weights: name of γ -> weight of that layer; the global mean stays unweighted. `mac_weights`
            makes them from what a channel costs.
        squared: (γ_i − γ̄)² in place of |γ_i − γ̄|.
        through_mean: whether γ̄ is differentiated through; False: it is a constant of each step.
        groups: regular expression on names -> {"lam": λ, "t": t}, either or both, for layers with
            their own; the first that matches a name decides. Where `lam` is assigned later, these λ
            change in proportion.
        start: number of steps before λ acts; γ are clamped from the first one on.

    Raises:
        ArgumentError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        lam: float,
        t: float,
        upper: float | None = 1.0,
        mean: str = "global",
        clamp: str = "scales",
        weights: Mapping[str, float] | None = None,
        *,
        squared: bool = False,
        through_mean: bool = True,
        groups: Mapping[str, Mapping[str, float]] | None = None,
        start: int = 0,
    ) -> None:
        if mean not in ("global", "layer", "weighted"):
            raise ArgumentError(f"mean={mean!r}: choose 'global', 'layer' or 'weighted'")
        if not isinstance(start, int) or start < 0:
            raise ArgumentError(f"start={start!r}: give a number of steps, 0 or more")
        super().__init__(lam, t, upper, mean == "layer", clamp, weights)
        self.kind = Kind.SQUARED if squared else Kind.POLARIZATION
        self.weighted, self.through = mean == "weighted", through_mean
        self.groups = _checked_groups(groups, lam, t, self.weighted) if groups else None
        self._start, self._taken = start, 0

    @property
    def t(self) -> float:
        return self._t

    @t.setter
    def t(self, value: float) -> None:
        if not -2.0 <= _finite("t", value) <= 2.0:
            raise ArgumentError(
                f"t={value!r}: choose from -2 (no γ is pushed to 0) to 2 (all are); what lies "
                "beyond does the same (Theorem 3.2)"
            )
        self._t = float(value)

    def penalty(self) -> Penalty:
        now = super().penalty()
        return now._replace(lam=0.0) if self._taken <= self._start and self._start else now

    def steer(
        self, scales: "ScalingFactors", optimizer: Optimizer, scale: Tensor | None = None
    ) -> None:
        self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken} if self._start else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._taken = state.get("taken", 0)

    def weights_of(self, names: Collection[str]) -> tuple[float, ...] | None:
        weights = super().weights_of(names)
        if not self.groups:
            return weights
        factors = [group[0] for group in self._by_groups(names)]
        return tuple(w * f for w, f in zip(weights or (1.0,) * len(factors), factors, strict=True))

    def tilts_of(self, names: Collection[str]) -> tuple[float, ...] | None:
        return tuple(group[1] for group in self._by_groups(names)) if self.groups else None

    def _by_groups(self, names: Collection[str]) -> list[tuple[float, float]]:
        """For each name, what its λ is multiplied with, and what is added to its t."""
        groups = self.groups or []
        unused = [p for p, *_ in groups if not any(p.search(name) for name in names)]
        if unused:
            raise ArgumentError(
                f"groups[{unused[0].pattern!r}] matches no scaling factor here; "
                f"names look like {', '.join(map(repr, list(names)[:2]))}"
            )
        every = [*groups, (re.compile(""), 1.0, 0.0)]
        return [next((f, tilt) for p, f, tilt in every if p.search(name)) for name in names]

    def _sum(
        self, layers: list[Tensor], weights: tuple[float, ...], tilts: tuple[float, ...]
    ) -> Tensor:
        gamma = torch.cat(layers)
        numels = torch.tensor([layer.numel() for layer in layers], device=gamma.device)
        each, tilt = (
            gamma.new_tensor(values).repeat_interleave(numels) for values in (weights, tilts)
        )
        if self.per_layer:
            means = torch.stack([layer.mean() for layer in layers])
            mean = means.repeat_interleave(numels)
        elif self.weighted:
            mean = (each * gamma).sum() / each.sum().clamp(min=torch.finfo(gamma.dtype).tiny)
        else:
            mean = gamma.mean()
        away = gamma - (mean if self.through else mean.detach())
        away = away.square() if self.kind == Kind.SQUARED else away.abs()
        return (each * ((self.t + tilt) * gamma.abs() - away)).sum()


def _checked_groups(
    groups: Mapping[str, Mapping[str, float]], lam: float, t: float, weighted: bool
) -> list[_Group]:
    found: list[_Group] = []
    for pattern, own in groups.items():
        where = f"groups[{pattern!r}]"
        try:
            names = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ArgumentError(f"{where}: not a regular expression on names: {error}") from error
        if not own or set(own) - {"lam", "t"}:
            raise ArgumentError(f"{where}={dict(own)!r}: give 'lam', 't' or both")
        strength = _finite(f"{where}['lam']", own.get("lam", lam))
        balance = _finite(f"{where}['t']", own.get("t", t))
        if strength < 0 or not -2.0 <= balance <= 2.0:
            raise ArgumentError(f"{where}={dict(own)!r}: λ cannot be negative, t lies in [-2, 2]")
        if "lam" in own and (weighted or not lam > 0):
            raise ArgumentError(
                f"{where}: a λ of its own is relative to lam=, which must be above 0, and would "
                "count in a weighted mean; use weights= there"
            )
        found.append((names, strength / lam if "lam" in own else 1.0, balance - t))
    return found


class _Rival(Regularizer):
    """What network slimming and DeepHoyer have in common: no t, and no clamp unless it is given."""

    def __init__(
        self,
        lam: float,
        upper: float | None = None,
        clamp: str = "scales",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(lam, upper=upper, clamp=clamp, weights=weights)


class L1(_Rival):
    """λ·Σ_i w·|γ_i|: network slimming (ICCV 2017, arXiv 1708.06519).

    Args:
        lam: λ ≥ 0, strength.
        upper: clamp γ to [0, upper] after each optimizer step; None: no clamp.
        clamp, weights: as in `Polarization`.

    Raises:
        ArgumentError: an argument is out of its range; the message names it.
    """

    kind = Kind.L1

    def _sum(
        self, layers: list[Tensor], weights: tuple[float, ...], tilts: tuple[float, ...]
    ) -> Tensor:
        norms = torch.stack([gamma.abs().sum() for gamma in layers])
        return (norms * norms.new_tensor(weights)).sum()


class DeepHoyer(_Rival):
    """λ·Σ_l w_l·‖γ_l‖₁²/‖γ_l‖₂² (ICLR 2020, arXiv 1908.09979).

    A layer whose γ are all 0 contributes 0, and so does its subgradient.

    Args:
        lam, upper, clamp, weights: as in `L1`.

    Raises:
        ArgumentError: as in `L1`.
    """

    kind = Kind.DEEPHOYER

    def _sum(
        self, layers: list[Tensor], weights: tuple[float, ...], tilts: tuple[float, ...]
    ) -> Tensor:
        # In units of the largest, so that no square is lost: the ratio is the same.
        zero = layers[0].new_zeros(1)
        largest = torch.stack([torch.cat((gamma.detach().abs(), zero)).max() for gamma in layers])
        units = torch.where(largest > 0, largest, 1.0).unbind()
        layers = [gamma / unit for gamma, unit in zip(layers, units, strict=True)]
        norms = torch.stack([gamma.abs().sum() for gamma in layers])
        squares = torch.stack([gamma.square().sum() for gamma in layers])
        ratio = norms.square() / torch.where(squares > 0, squares, 1.0)
        return (ratio * norms.new_tensor(weights)).sum()
