"""`FlopsTarget`: polarization that steers itself to a share of MACs, in one training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..planning.prediction import CutPredictor
from ..planning.thresholds import as_factors, thresholds
from ..scaling.factors import ScalingFactors
from ..sharding import Part, local
from ..stepping.regularizers import Polarization

#: How far t may lean from the balance at which both sides are pushed alike; at 1, one is not.
LEAN = 0.5
#: Steps over which λ rises to its value, where `steps` is not given.
RAMP = 100
#: λ may grow to this many times its value while the factors have not parted in time.
LARGEST_GROWTH = 30.0
#: A factor under this has arrived at 0: in the first bin of the valley's histogram.
AT_ZERO = 0.01
#: What the live cut may differ from the one asked for before t and λ act on it.
CLOSE = 0.003
#: How t answers to what the live cut lacks.
GAIN = 2.0


class FlopsTarget(Polarization):
    """Polarization for a share of MACs: t and λ steer themselves, and one training is enough.

    The penalty is the paper's with one change. In Eq. 2, which side of the mean a factor is on
    decides where it is pushed, and t alone decides how many end at 0. Here the MACs decide:

        R_s(γ) = Σ_i ( t·|γ_i| − σ_i·(γ_i − γ̄) ),   σ_i = −1 if γ_i ≤ c, else +1

    where c is the value for which removing all factors up to c cuts the share asked for, as
    predicted from the γ of the moment. With c = γ̄ this is Eq. 2. (A step has Eq. 2's signs in the
    derivative of γ̄: one constant for all γ, which t allows for.) Factors near c change sides as the
    task moves them, until a gap opens around c; then both formulas are the same.

    - t follows Theorem 3.2, t = 2 − 4ρ with ρ the share of factors above c, corrected in proportion
      to what the live cut (valley thresholds) lacks, within the limits between which the two sides
      move apart, and within [−2, 2].
    - λ rises to its value over the first steps, in which the task sorts the factors. From then on
      it grows for as long as the live cut lacks; once the cut is reached it returns.

    `lam` and `t` can be read at any time. Everything follows from γ, so all processes of a
    data-parallel training agree without talking to each other; sharded γ (`fully_shard`) are
    gathered every `every` steps. What is steered are the factors of the step: `scales`,
    `scales.rebind(model)` or `scales.select(...)` of these.

    Args:
        model, example_inputs, scales: as for `plan`; the model before it is sharded.
        cut: the share of MACs to cut, in (0, 1).
        lam: λ > 0 to start from; 3 times too much or too little is mended.
        steps: number of optimizer steps of the training, if it is known: λ rises over the first
            tenth, and grows in time for its end.
        upper, clamp: as in `Polarization`.
        fold, round_to, min_channels: those of the plan to be made at the end.
        every: steps between two looks at the γ.

    Raises:
        ArgumentError: an argument is out of its range, or the share cannot be reached with these
            scaling factors; the message says what can.
        PlanError, TracingError: as in `plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        scales: ScalingFactors,
        cut: float = 0.54,
        *,
        lam: float = 1e-4,
        steps: int | None = None,
        upper: float = 1.0,
        clamp: str = "scales",
        fold: str = "exact",
        round_to: int = 1,
        min_channels: int = 1,
        every: int = 10,
    ) -> None:
        super().__init__(lam, 0.0, upper, clamp=clamp)
        _check(cut, lam, steps, every)
        self.cut = float(cut)
        self.predictor = CutPredictor(
            model, example_inputs, scales, fold=fold, round_to=round_to, min_channels=min_channels
        )
        self._every = every
        self._steered: ScalingFactors | None = None  # those of the last step
        self._part: Part | None = None  # of these
        self._ramp = RAMP if steps is None else max(steps // 10, 1)
        self._growth = 1.01**every if steps is None else 10 ** (4 * every / steps)
        self._start = float(lam)
        self._factor = 1.0  # λ of the moment / λ given, but for the first rise
        self._step = 0
        self._border = 0.0  # c
        self._count = 0  # factors up to c
        self._protected: list[int] = []  # flat places of factors that count as above c
        self._held: Tensor | None = None  # those that this process holds, where the factors are
        self._parted = False
        names = list(scales)
        self._staying = {names[row] for row in self.predictor.layers_that_stay()}
        self._check_reachable()

    # --- what a training step calls

    def steer(
        self, scales: ScalingFactors, scale: Tensor | None = None, maximize: bool = False
    ) -> None:
        """Called by `pf.step` and attached optimizers before λ·∂R_s is added to γ.grad: looks at
        the γ now and then, and puts factors between c and γ̄ on the side that c says.
        """
        if self.weights is not None or self.per_layer:
            raise ArgumentError(
                "FlopsTarget has one mean and no layer weights: leave weights= None and per_layer "
                "False, or use Polarization"
            )
        if scales is not self._steered:
            self._follow(scales)
        if self._step % self._every == 0:
            self._look(scales)
        self._step += 1
        self.lam = self._start * self._factor * min(self._step / self._ramp, 1.0)
        if not self._parted:
            self._correct(scales, scale, maximize)

    def _follow(self, scales: ScalingFactors) -> None:
        """Steer these factors from now on: those that were given, as their parameters are now, or
        some of them. The others are predicted to be pruned where their own valleys say so.
        """
        pruned = self.predictor.scales
        if self._steered is not None and set(scales) != set(self._steered):
            raise ArgumentError(
                f"this FlopsTarget steered {len(self._steered)} layers before and is now to steer "
                f"{len(scales)}, others among them: make one for each set of factors"
            )
        for name in scales:
            if name not in pruned:
                raise ArgumentError(
                    f"{name!r} is stepped, and is not among the scales that FlopsTarget was made "
                    "with: give it all that are pruned"
                )
        self.predictor.rebind(scales)
        if len(scales) < len(pruned):
            self._check_reachable(scales)
        self._steered, self._part, self._held = scales, Part(scales), None

    @torch.no_grad()
    def _correct(self, scales: ScalingFactors, scale: Tensor | None, maximize: bool) -> None:
        part, gammas = self._part, scales.values()
        assert part is not None
        held = [local(gamma.detach()) for gamma in gammas]
        flat = torch.cat([gamma.reshape(-1) for gamma in held]).double()
        if self._held is None or self._held.device != flat.device:  # a GPU waits for this
            self._held = _indices(part.places(self._protected), flat)
        wanted = self._side(flat, self._held)
        # The kernel adds −sgn(γ − γ̄): what is missing to −σ.
        change = (self.lam * (-1 if maximize else 1)) * (
            torch.sign(flat - part.mean(flat)) - wanted
        )
        if scale is not None:
            change = change * scale.to(change.dtype)
        pieces = change.to(held[0].dtype).split([gamma.numel() for gamma in held])
        pairs = [
            (local(gamma.grad), piece)
            for gamma, piece in zip(gammas, pieces, strict=True)
            if gamma.grad is not None and gamma.requires_grad and piece.numel()
        ]
        if pairs:
            grads = [grad for grad, _ in pairs]
            torch._foreach_add_(grads, [piece.view_as(grad) for grad, piece in pairs])

    def _side(self, flat: Tensor, protected: Tensor) -> Tensor:
        """σ of factors, those at the places `protected` above c."""
        side = torch.where(flat > self._border, 1.0, -1.0).to(flat.dtype)
        return side.index_fill_(0, protected, 1.0)

    @torch.no_grad()
    def _look(self, scales: ScalingFactors) -> None:
        """Set c, t and the growth of λ from the γ of the moment."""
        compared = self.predictor.look()
        steered = {name: compared[name] for name in scales}
        others = {name: gamma for name, gamma in compared.items() if name not in steered}
        flat = torch.cat(list(steered.values()))
        self._protected, self._held = self._strongest(steered), None
        flat_guarded = flat.clone()
        flat_guarded[self._protected] = float("inf")
        sizes = [gamma.numel() for gamma in steered.values()]
        guarded = {**compared, **dict(zip(steered, flat_guarded.split(sizes), strict=True))}
        held = thresholds(as_factors(others)) if others else {}
        order = flat_guarded.sort().values
        self._count = self.predictor.count_for(self.cut, guarded, self._count, CLOSE, held, order)
        self._border = _between(order, self._count)
        signs = torch.sign(flat - flat.mean())
        sides = self._side(flat, _indices(self._protected, flat))
        self._parted = bool((signs == sides).all())
        lacking = self.cut - self.predictor.cut_of(compared)
        wanted = 2.0 - 4.0 * float((sides > 0).float().mean()) + GAIN * lacking
        balance = -float(signs.mean())
        self.t = min(max(wanted, balance - LEAN, -2.0), balance + LEAN, 2.0)
        falling = bool(((sides < 0) & (flat > AT_ZERO)).any())
        if lacking <= CLOSE or not falling:
            self._factor = max(1.0, self._factor * 0.8)
        elif self._step > self._ramp:
            self._factor = min(LARGEST_GROWTH, self._factor * self._growth)

    def _strongest(self, steered: Mapping[str, Tensor]) -> list[int]:
        """Place of the largest factor in each layer without which nothing would reach an output."""
        places, start = [], 0
        for name, gamma in steered.items():
            if name in self._staying:
                places.append(start + int(gamma.argmax()))
            start += gamma.numel()
        return places

    def _check_reachable(self, steered: Mapping[str, Tensor] | None = None) -> None:
        largest = self.predictor.largest_cut(steered)
        if self.cut > largest:
            some = "" if steered is None else " that are stepped"
            raise ArgumentError(
                f"cut={self.cut:g}: these scaling factors{some} can cut {largest:.3f} of the MACs "
                "at most, with every layer at its last channel; ask for less, or let more layers "
                "take part (residual='expand' or 'couple' in scaling_factors, smaller min_channels)"
            )

    # --- the penalty's value, checkpoints

    def _terms(self, gamma: Tensor, mean: Tensor) -> Tensor:
        if self._step == 0:
            return super()._terms(gamma, mean)
        side = self._side(gamma.detach(), _indices(self._protected, gamma))
        return self.t * gamma.abs() - side * (gamma - mean)

    def state_dict(self) -> dict[str, Any]:
        """All that steering depends on besides γ: plain numbers."""
        return {
            "cut": self.cut,
            "step": self._step,
            "factor": self._factor,
            "border": self._border,
            "count": self._count,
            "protected": list(self._protected),
            "parted": self._parted,
            "lam": self.lam,
            "t": self.t,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ArgumentError: the state lacks something, or is of another share.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ArgumentError(f"state lacks {', '.join(sorted(missing))}: not of a FlopsTarget")
        if state["cut"] != self.cut:
            raise ArgumentError(f"state is of cut={state['cut']!r}, not of cut={self.cut!r}")
        self._step, self._factor = state["step"], state["factor"]
        self._border, self._count = state["border"], state["count"]
        self._protected, self._held = list(state["protected"]), None
        self._parted, self.lam, self.t = state["parted"], state["lam"], state["t"]


def _indices(places: list[int], like: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.long, device=like.device)


def _between(order: Tensor, count: int) -> float:
    """A border with `count` of these sorted values under it. Equal values around it all end up
    under it if they are on the lower side of the mean, else none.
    """
    below = float(order[count - 1]) if count else -1.0
    above = float(order[count]) if count < order.numel() else below + 1.0
    if below < above:
        return (below + min(above, below + 1.0)) / 2
    middle = float(order[order.isfinite()].mean())
    return below if below < middle else below * (1.0 - 1e-6)


def _check(cut: float, lam: float, steps: int | None, every: int) -> None:
    if not isinstance(cut, int | float) or not 0.0 < cut < 1.0:
        raise ArgumentError(f"cut={cut!r}: give the share of MACs to cut, between 0 and 1")
    if not lam > 0:
        raise ArgumentError(f"lam={lam!r}: nothing is cut without a strength λ above 0")
    for name, number in (("steps", steps), ("every", every)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ArgumentError(f"{name}={number!r}: give a whole number of steps, at least 1")
