"""`FlopsTarget`: polarization that steers itself to a share of MACs, in one training."""

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArgumentError, StepError
from ..kernels.table import Kind
from ..planning.costs import NAMES, Latencies
from ..planning.plan import check_scales
from ..planning.prediction import CutPredictor
from ..planning.thresholds import as_factors, thresholds
from ..scaling.factors import ScalingFactors
from ..sharding import Part, is_sharded, local, present_parameters, whole
from ..stepping.binding import is_capturing
from ..stepping.regularizers import Polarization
from .borders import apart, between, center_of, places, resting
from .pace import (
    FALL,
    cannot_move,
    coasting,
    groups_of,
    rate_of,
    scales_gradients,
    steps_to_fall,
    strength_for,
)
from .shortfall import Shortfall
from .slim_form import SlimForm

#: Optimizer steps that a training is taken to have where `steps` is not given.
HORIZON = 1000
#: The share to cut rises from 0 to all of it between these parts of the training. A network that
#: loses channels before it has learned may not learn any more (benchmarks/bench_start.py).
FIRST, LAST = 0.4, 0.7
#: A factor up to the first is as good as at 0: in the first bin of the valley's histogram. One that
#: is to go is pushed on until it is at the second.
AT_ZERO, ARRIVED = 0.01, 0.001
#: What the live cut may lack, or the choice of before miss, before something is done about it.
CLOSE = 0.003
#: Where a prediction takes passes through the network, they are taken at one in so many looks.
PASSES = 5
#: From this part of the training on, it is said where the share is out of reach.
EARLY = 0.15
#: What the training may miss at its end before a warning says so.
MISSED = 0.01
#: λ changes by up to this factor a step, up and down, and in a short training by what this factor
#: is in the whole of it.
GROWTH, GROWTH_IN_ALL = 1.035, 1e4
#: How many times less and more than estimated at first λ may become.
LEAST, MOST = 0.1, 100.0


class FlopsTarget(Polarization):
    """Polarization for a share of MACs: it finds λ and chooses sides, and one training is enough.

    In Eq. 2 every factor is compared with the mean of all, and t alone decides how many end at 0.
    Here each layer has a center of its own, and the MACs decide where it lies:

        R_s(γ) = Σ_l Σ_i ( |γ_i| − |γ_i − c_l| ),   i over the factors of layer l

    A factor above its layer's center feels nothing: what stays is left to the task. One below it is
    pushed to 0, with 2λ.

    - The factors that go are the smallest in proportion to the mean of their layer: c_l = c·γ̄_l,
      with c such that removing all up to their centers cuts the share due, as predicted from the
      γ of the moment. (An equal comparison over all layers empties whole layers, whose factors
      happen to drift down together.) A layer that must not be emptied keeps its largest factor.
      Factors to go that are next to equal to some that stay are set up to 5 % lower, so that a
      center fits between.
    - The share due rises from 0 to `cut` between four and seven tenths of the training: first the
      network learns.
    - λ starts from what a factor needs to fall to 0 in time, by the learning rate of its parameter
      group, and follows how fast factors do fall. Where momentum will take it to 0, it is gone.

    A training that falls behind, or ends elsewhere than at `cut`, warns: what lacks, and what to
    change. `print(reg)` says where it is.

    Everything follows from γ, their gradients and momentum, so all processes of a data-parallel
    training agree without talking to each other; what is sharded (`fully_shard`) is gathered every
    `every` steps. Steered are the factors of the step: `scales`, `scales.rebind(model)` or
    `scales.select(...)` of these.

    Args:
        model, example_inputs, scales: as for `plan`; the model before it is sharded.
        cut: the share of MACs (or of `of`) to cut, in (0, 1).
        steps: number of optimizer steps of the training, ``epochs * len(loader)``. Without it,
            1,000 are assumed: the share is reached after 700 and held from then on.
        upper, clamp: as in `Polarization`.
        of: what `cut` is a share of: "macs", "params", or "latency", the time of one forward pass.
        latency: the network's `LatencyTable`, for "latency".
        fold, round_to, min_channels: those of the plan to be made at the end. With "latency",
            widths become multiples of the table's step, as in `plan`.
        with_bias: in layers whose removed channels would leave something behind that the slim model
            cannot take up exactly (before a squeeze-excite gate or a padded depthwise
            convolution), the BatchNorm's bias β is brought to 0 with the factor, and then nothing
            is left. False: it is not. Networks with gates have no such layers.
        every: steps between two looks at the γ; by default 10, and fewer in a short training.

    Attributes:
        live: the share that a plan would have cut at the last look.
        lam: λ of the moment.

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
        steps: int | None = None,
        upper: float = 1.0,
        clamp: str = "scales",
        fold: str = "exact",
        round_to: int = 1,
        min_channels: int = 1,
        with_bias: bool = True,
        every: int | None = None,
        of: str = "macs",
        latency: Latencies | None = None,
    ) -> None:
        check_scales("pf.FlopsTarget", scales)
        _check(cut, steps, every)
        frozen = [name for name, gamma in scales.items() if not gamma.requires_grad]
        if frozen:
            warnings.warn(
                f"FlopsTarget: {len(frozen)} of {len(scales)} layers have frozen γ "
                f"(requires_grad=False; {', '.join(frozen[:3])}), which no step moves: unfreeze "
                "them, or leave them out with scales.select(...)",
                stacklevel=2,
            )
        super().__init__(0.0, 1.0, upper, clamp=clamp)
        self.kind = Kind.CENTERED
        self.cut, self.live = float(cut), 0.0
        self.predictor = CutPredictor(
            model,
            example_inputs,
            scales,
            fold=fold,
            round_to=round_to,
            min_channels=min_channels,
            of=of,
            latency=latency,
        )
        self._what = NAMES[of]
        self._followed: SlimForm | None = None  # the network's slim form, where that trains now
        self._gone: set[str] = set()  # layers that this one has no more
        self._others = tuple(scales.others)
        self._steps, self._horizon = steps, steps or HORIZON
        self._every = every or min(max(self._horizon // 60, 1), 10)
        self._steered: ScalingFactors | None = None  # those of the last step
        self._part: Part | None = None  # of these
        self._step, self._looked = 0, -1
        self._estimate = 0.0  # λ at first; 0: not known yet
        self._count = 0  # factors to go
        self._before: Tensor | None = None  # where their factors came to rest at the last look
        self._off = 0.0  # by how much rough predictions are
        self._fall = FALL * self._horizon  # steps in which a factor is to fall to 0
        self._speed = 0.0  # by which factors that are to go have fallen a step, since then
        self._way = 0.0  # that they have to go, on average
        self._up = 0.0  # the mean of all factors that are not at 0
        self._warned = False
        self._leaks = self.predictor.leaks() if with_bias else {}
        names = list(self.predictor.scales)
        self._staying = {names[row] for row in self.predictor.layers_that_stay()}
        self._check_reachable()

    def follow(self, slim: nn.Module) -> ScalingFactors:
        """Go on with the network's slim form, in the middle of the training (`shrink`). Nothing
        changes but that channels at 0 are no longer there: shares are still those of the network
        that this was made with, whose γ and β are kept up to date from now on. To resume: follow
        first, then `load_state_dict`.

        Args:
            slim: what `shrink` returned, made from that network, at once or step by step.

        Returns:
            The slim network's scaling factors, to step with from now on.

        Raises:
            ArgumentError: `slim` was not made from that network.
        """
        form = SlimForm(slim, self.predictor.watched())
        params = form.parameters()
        pruned = self.predictor.scales
        gone = {name for name in pruned if not params[name].numel()}
        if self._steered is not None and self.centers is not None:
            sizes = [pruned[name].numel() for name in self._steered if name not in self._gone]
            left = [name not in gone for name in self._steered if name not in self._gone]
            self.centers = tuple(itertools.compress(self.centers, left))
            self._count -= min(sum(sizes) - sum(itertools.compress(sizes, left)), self._count)
            if self._before is not None:
                self._before = torch.cat([*itertools.compress(self._before.split(sizes), left)])
        self._followed, self._gone = form, gone
        factors = {name: params[name] for name in pruned if name not in gone}
        others = {name: params[name] for name in self._others if params[name].numel()}
        return ScalingFactors(factors, others=others, residual=pruned.residual, model=form.model)

    @property
    def shrunk(self) -> bool:
        return self._followed is not None

    def due(self, step: int) -> float:
        """The share of MACs that is to be cut after so many steps."""
        part = (step / self._horizon - FIRST) / (LAST - FIRST)
        return self.cut * min(max(part, 0.0), 1.0)

    # --- what a training step calls

    def steer(
        self, scales: ScalingFactors, optimizer: Optimizer, scale: Tensor | None = None
    ) -> None:
        """Called by `pf.step` and attached optimizers before λ·∂R_s is added to γ.grad: looks at
        the γ now and then, and parts some that are next to equal.
        """
        if self.weights is not None or self.per_layer:
            raise ArgumentError(
                "FlopsTarget has its own center of each layer and no layer weights: leave weights= "
                "None and per_layer False, or use Polarization"
            )
        if is_capturing():
            raise StepError(
                "FlopsTarget looks at γ every few steps and changes λ and its centers, which a "
                "CUDA graph would repeat as they are now: capture forward and backward alone, and "
                "take pf.step after each replay"
            )
        if scales is not self._steered:
            self._steer(scales)
        last = self._step + 1 == self._steps
        if self._step % self._every == 0 or last:
            self._look(scales, optimizer, scale, last)
            self._looked = self._step
            self._warn(scales, optimizer, last)
        self._step += 1

    def _steer(self, scales: ScalingFactors) -> None:
        """Steer these factors from now on: those that were given, as their parameters are now, or
        some of them. The others are predicted to be pruned where their own valleys say so.
        """
        pruned = self.predictor.scales
        if self._steered is not None and set(scales) != set(self._steered) - self._gone:
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
        if self._followed is None:
            self.predictor.rebind(scales)
            if len(scales) < len(pruned):
                self._check_reachable(scales)
        self._steered, self._part = scales, Part(scales)

    @torch.no_grad()
    def _look(
        self, scales: ScalingFactors, optimizer: Optimizer, scale: Tensor | None, last: bool
    ) -> None:
        """Set the centers and λ from the γ of the moment."""
        self.keep_up()
        compared = self.predictor.look()
        steered = {name: compared[name] for name in scales}
        self.live = self._live(compared, last)
        far = coasting(scales, optimizer)
        if self._followed is not None:
            far = self._followed.spread(far, steered)
        rest = resting(steered, far, self.upper is not None)
        flat, coming = torch.cat(list(steered.values())), torch.cat(list(rest.values()))
        if self._before is not None:
            moved = (self._before - coming)[self._below_centers(steered) & (flat > ARRIVED)]
            self._speed = float(moved.mean()) / self._every if moved.numel() else 0.0
        up = flat[flat > AT_ZERO]
        self._up = float(up.mean()) if up.numel() else 0.0
        self._fall = steps_to_fall(scales, optimizer, self._up, self._horizon)
        going = self._choose(compared, steered, rest)
        assert self.centers is not None
        for name, (near, size) in apart(steered, going, self.centers).items():
            self._move(name, scales[name], near, size)
            rest[name] = rest[name] - near * (steered[name] - size)
            steered[name] = torch.where(near, size, steered[name])
        flat = torch.cat(list(steered.values()))
        chosen = self._below_centers(steered)
        falling = flat[chosen & (flat > ARRIVED)]
        self._way = float(falling.mean()) if falling.numel() else 0.0
        if bool(chosen.any()):
            self._change_strength(scales, optimizer, scale)
        self._before = torch.cat(list(rest.values()))

    @torch.no_grad()
    def settle(self, scales: ScalingFactors) -> None:
        """Called by `pf.step` and attached optimizers at the end of a step: factors that are to go
        and as good as at 0 are set to it, and what they would leave behind goes there, too, as fast
        as factors do. (A BatchNorm further on, as behind a depthwise convolution, would make a
        small channel large again.)
        """
        if self._step - 1 != self._looked or self._count == 0 or self.centers is None:
            return
        for gamma, center in zip(scales.values(), self.centers, strict=True):
            if gamma.requires_grad:
                values: Tensor = local(gamma.detach())
                values *= values.abs() > min(center, AT_ZERO)
        leaks = {name: self._leaks[name] for name in scales if name in self._leaks}
        if not leaks:
            return
        model = self.predictor.model if self._followed is None else self._followed.model
        tensors: dict[str, Tensor] = {**present_parameters(model), **dict(model.named_buffers())}
        far = self._every * self._up / (FALL * self._horizon)
        gammas = whole({name: scales[name].detach() for name in leaks})
        for name, others in leaks.items():
            for each in map(tensors.__getitem__, others):
                whole_or_part: Tensor = gammas[name]
                if is_sharded(each):
                    whole_or_part = local(scales[name].detach())
                part = local(each.detach())
                part -= part.clamp(-far, far) * (whole_or_part == 0)

    def keep_up(self) -> None:
        """Give the network that this was made with the γ and β that its slim form has now, where
        there is one (`follow`).
        """
        if self._followed is not None:
            self._followed.write_to(self.predictor.watched())

    def _below_centers(self, steered: Mapping[str, Tensor]) -> Tensor:
        """Which factors are to go, bool [n]."""
        centers = self.centers or (-1.0,) * len(steered)
        return torch.cat([v <= c for v, c in zip(steered.values(), centers, strict=True)])

    def _live(self, compared: Mapping[str, Tensor], last: bool) -> float:
        """The share that a plan would cut. Where that takes passes through the network (coupled
        channels), these are taken now and then, and rough predictions are set right by them.
        """
        if not self.predictor.guesses:
            return self.predictor.cut_of(compared)
        rough = self.predictor.cut_of(compared, roughly=True)
        if last or self._step // self._every % PASSES == 0:
            self._off = rough - self.predictor.cut_of(compared)
        return rough - self._off

    def _choose(
        self, compared: Mapping[str, Tensor], steered: Mapping[str, Tensor], rest: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Set the centers such that what is below them cuts the share that will soon be due,
        together with what momentum takes to 0 (whose `rest` is there) in any case. Returns which
        factors of each layer are to be pushed, bool [C].
        """
        units = self._units(steered)
        ratios = {name: gamma / units[name] * (rest[name] > 0) for name, gamma in steered.items()}
        for name, each in ratios.items():
            if self._steered is not None and not self._steered[name].requires_grad:
                ratios[name] = torch.where(steered[name] > AT_ZERO, math.inf, 0.0)  # as they are
            elif name in self._staying:  # the largest of those that momentum does not take
                each[(each if each.any() else rest[name]).argmax()] = math.inf
        ratio = torch.cat(list(ratios.values()))
        order = places(ratio, torch.cat(list(rest.values())))
        order = order.where((ratio > 0) & ratio.isfinite(), ratio)
        sizes = [gamma.numel() for gamma in steered.values()]
        ranked = dict(zip(steered, order.split(sizes), strict=True))
        out = self._gone | steered.keys()
        others = {name: gamma for name, gamma in compared.items() if name not in out}
        held = thresholds(as_factors(others)) if others else {}
        held |= dict.fromkeys(self._gone, 0.0)
        order = order.sort().values
        due = self.due(self._step + round(self._fall))
        if due <= 0.0:
            self._count = 0
        else:
            self._count = self.predictor.count_for(
                due + self._off, {**compared, **ranked}, self._count, CLOSE, held, order
            )
            self._count = max(self._count, int((order <= 0).sum()))  # what is at 0 is held there
        last = between(order, self._count)
        going = {name: place <= last for name, place in ranked.items()}
        border = between(ratio.sort().values, self._count)
        self.centers = tuple(
            center_of(g, going[name], border * units[name]) for name, g in steered.items()
        )
        return {name: chosen & (ratios[name] > 0) for name, chosen in going.items()}

    def _units(self, steered: Mapping[str, Tensor]) -> dict[str, float]:
        """What the factors of each layer are measured in when they are compared."""
        return {name: max(float(gamma.mean()), AT_ZERO) for name, gamma in steered.items()}

    def _move(self, name: str, gamma: Tensor, which: Tensor, size: float) -> None:
        """Give those of a layer's factors [C] a size."""
        assert self._part is not None  # of the scales that are steered
        if self._followed is not None:
            which = self._followed.part(name, which)
        values: Tensor = local(gamma.detach())
        which = self._part.of(gamma, which).to(values.device)
        values.copy_(torch.where(which, values.sign() * size, values))

    def _change_strength(
        self, scales: ScalingFactors, optimizer: Optimizer, scale: Tensor | None
    ) -> None:
        """λ for the steps until the next look."""
        wanted = self._up / (FALL * self._horizon)  # the whole way, from where factors start
        rate, group = rate_of(scales, optimizer)
        part = self._part
        assert part is not None  # of the scales that are steered
        if rate == 0.0:
            return  # a warm-up that has not begun: nothing moves, whatever λ is
        if self._estimate == 0.0:
            found = strength_for(wanted, scales, optimizer, part, scale)
            if math.isfinite(found):  # no infinite gradient, in a step that is going to be skipped
                self.lam = self._estimate = found
            return
        if not scales_gradients(group):  # a larger learning rate than any before needs less
            less = min(strength_for(wanted, scales, optimizer, part, scale) / self._estimate, 1.0)
            self._estimate, self.lam = less * self._estimate, less * self.lam
        change = max(GROWTH, GROWTH_IN_ALL ** (1 / self._horizon)) ** -self._every
        if self._way:
            change = min(max(wanted / max(self._speed, 1e-12), change), 1 / change)
        lam = self.lam * change
        self.lam = min(max(lam, LEAST * self._estimate), MOST * self._estimate)

    def _warn(self, scales: ScalingFactors, optimizer: Optimizer, last: bool) -> None:
        """Say it where the share will not be reached: once while there is time, and at the end."""
        if self._steps is None:
            return
        left = self._steps - self._step - 1
        if last:
            missed = abs(self.live - self.cut) > MISSED
        elif self._warned or self._step < EARLY * self._steps:
            return
        else:
            due, way = self.due(self._step), self._way if self._count else self._up
            late = due - self.live > max(0.1 * self.cut, MISSED)
            slow = 3 * due >= 2 * self.cut and self._speed * left < way
            hopeless = cannot_move(scales, optimizer, way, left)
            missed = hopeless if due == 0.0 else late and (slow or hopeless)
        if missed:
            self._warned = True
            lack = Shortfall(
                step=self._step + 1,
                steps=self._steps,
                what=self._what,
                cut=self.cut,
                live=self.live,
                arrived=self._count > 0 and self._way <= AT_ZERO,
                way=self._way if self._count else self._up,
                speed=self._speed,
                up=self._up,
                rate=max(float(group["lr"]) for group in groups_of(scales, optimizer)),
                dtype=next(iter(scales.values())).dtype,
            )
            warnings.warn(str(lack), stacklevel=6)  # who called pf.step or an attached step

    def remark(self) -> str | None:
        due = self.due(self._step)
        if due >= self.cut or self._step == 0:
            return None
        told = "1,000 were assumed" if self._steps is None else f"it was told {self._steps:,}"
        return (
            f"FlopsTarget has taken {self._step:,} steps and {told}: so far {due:.1%} of the "
            f"{self._what} were due, of {self.cut:.1%} asked for. Give it steps= of the whole "
            "training, or go on"
        )

    def _check_reachable(self, steered: Mapping[str, Tensor] | None = None) -> None:
        largest = self.predictor.largest_cut(steered)
        if self.cut > largest:
            some = "" if steered is None else " that are stepped"
            raise ArgumentError(
                f"cut={self.cut:g}: these scaling factors{some} can cut {largest:.3f} of the "
                f"{self._what} at most, with every layer at its last channel; ask for less, or let "
                "more layers take part (residual='expand' or 'couple' in scaling_factors, smaller "
                "min_channels)"
            )

    # --- the penalty's value, what people see, checkpoints

    def _sum(
        self, layers: list[Tensor], weights: tuple[float, ...], tilts: tuple[float, ...]
    ) -> Tensor:
        centers = self.centers or (0.0,) * len(layers)
        if len(centers) != len(layers):
            raise ArgumentError(
                f"value() of {len(layers)} layers, but {len(centers)} are steered: give it the "
                "scaling factors of the step"
            )
        terms = [
            (gamma.abs() - (gamma - center).abs()).sum()
            for gamma, center in zip(layers, centers, strict=True)
        ]
        return torch.stack(terms).sum()

    @property
    def state(self) -> str:
        """What it is doing, in a word or two."""
        if self._step == 0:
            return "not started"
        if self.due(self._step) == 0.0:
            return "waiting"
        lacking = self.due(self._step) - self.live
        if lacking > 0.1 * self.cut:
            return "behind"
        return "steering" if self.due(self._step) < self.cut or lacking > MISSED else "holding"

    def _facts(self) -> dict[str, str]:
        steps = f"{self._step}" if self._steps is None else f"{self._step} of {self._steps}"
        return {
            f"{self._what} to cut": f"{self.cut:.1%}",
            "due now": f"{self.due(self._step):.1%}",
            "cut now": f"{self.live:.1%}",
            "λ": f"{self.lam:.2g}",
            "t": f"{self.t:g}",
            "step": steps,
            "state": self.state,
            **({"layers with β at 0 too": str(len(self._leaks))} if self._leaks else {}),
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"FlopsTarget({facts})"

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{k}</th><td>{v}</td></tr>" for k, v in self._facts().items())
        return f"<table><caption>FlopsTarget</caption>{cells}</table>"

    def state_dict(self) -> dict[str, Any]:
        """All that steering depends on besides γ: plain numbers, lists of them, and None."""
        return {
            "cut": self.cut,
            "steps": self._steps,
            "step": self._step,
            "lam": self.lam,
            "estimate": self._estimate,
            "live": self.live,
            "off": self._off,
            "count": self._count,
            "centers": list(self.centers or ()),
            "rest": [] if self._before is None else self._before.tolist(),
            "speed": self._speed,
            "way": self._way,
            "up": self._up,
            "fall": self._fall,
            "warned": self._warned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ArgumentError: the state lacks something, or is of another share, number of steps or
                network.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ArgumentError(f"state lacks {', '.join(sorted(missing))}: not of a FlopsTarget")
        for name, mine in (("cut", self.cut), ("steps", self._steps)):
            if state[name] != mine:
                raise ArgumentError(
                    f"state is of {name}={state[name]!r}, not of {name}={mine!r}: make the "
                    f"FlopsTarget with {name}={state[name]!r}"
                )
        left = {n: g for n, g in self.predictor.scales.items() if n not in self._gone}
        mine, theirs = sum(gamma.numel() for gamma in left.values()), len(state["rest"])
        if theirs > mine:
            raise ArgumentError(
                f"state is of {theirs} scaling factors, and this FlopsTarget has {mine}: make it "
                "with the network that the training began with, then reg.follow(slim) where it "
                "has been made smaller since, then load_state_dict"
            )
        self._step, self.lam, self._estimate = state["step"], state["lam"], state["estimate"]
        self.live, self._count, self._speed = state["live"], state["count"], state["speed"]
        self._off = state["off"]
        self.centers = tuple(state["centers"]) or None
        before = torch.tensor(state["rest"], device="cpu", dtype=torch.float32)
        self._before = before if len(before) else None
        self._way, self._up, self._fall = state["way"], state["up"], state["fall"]
        self._warned = state["warned"]


def _check(cut: float, steps: int | None, every: int | None) -> None:
    if not isinstance(cut, int | float) or not 0.0 < cut < 1.0:
        raise ArgumentError(f"cut={cut!r}: give the share to cut, between 0 and 1")
    for name, number in (("steps", steps), ("every", every)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ArgumentError(f"{name}={number!r}: give a whole number of steps, at least 1")
