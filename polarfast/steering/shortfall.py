"""Why a training does not reach its share, and what to change: the warning of `FlopsTarget`."""

from dataclasses import dataclass

import torch

#: From scratch, γ start no higher than this.
LOW = 0.6
#: A training has more steps than this.
FEW = 50


@dataclass(frozen=True)
class Shortfall:
    """The state of things where the share is missed, or will be; `str` of it is the warning.

    Attributes:
        step, steps: taken, and told of.
        what: what the share is of.
        cut, live: asked for, and what pruning now would cut.
        arrived: whether all γ that are to go are at 0.
        way, speed: how far the γ that are to go are from 0 on average (all, where none is chosen
            yet), and fall a step.
        up: the mean of all γ that are not at 0.
        rate: the largest learning rate of any of them.
        dtype: of γ.
    """

    step: int
    steps: int
    what: str
    cut: float
    live: float
    arrived: bool
    way: float
    speed: float
    up: float
    rate: float
    dtype: torch.dtype

    def __str__(self) -> str:
        found = (
            f"FlopsTarget: after {self.step} of {self.steps} steps pruning would cut "
            f"{self.live:.1%} of the {self.what}; {self.cut:.1%} are asked for"
        )
        if self.live > self.cut:
            return (
                f"{found}. The γ that stay are too close to 0 in some layers, or single channels "
                "cost too much to come closer; pf.plan(..., cut=) cuts what is asked for"
            )
        if self.arrived:
            return (
                f"{found}. All γ that are to go are at 0, but their layers show no gap: train "
                "longer, or take pf.plan(..., cut=)"
            )
        left = self.steps - self.step
        longer = "Train longer"
        if not left:
            longer = "Go on with this same FlopsTarget for more steps, at a larger learning rate"
        lower = ", or start them lower (pf.init_scales(scales, 0.5) before a training from scratch)"
        return (
            f"{found}. The γ that are to go are at {self.way:.2g} on average and fall by "
            f"{max(self.speed, 0.0):.1g} a step at a learning rate of {self.rate:.2g}, with {left} "
            f"steps left. {longer}, or give the γ a parameter group of their own with a larger lr "
            f"and no weight decay{lower if self.up >= LOW else ''}{self._coarse()}{self._few()}"
        )

    def _few(self) -> str:
        """One more reason, if there are hardly any steps."""
        few = self.steps < FEW
        return f". steps={self.steps} is short: epochs * len(loader) are meant" if few else ""

    def _coarse(self) -> str:
        """One more reason why γ do not fall, if they are of a short dtype."""
        lost = torch.finfo(self.dtype).eps / 2
        if lost < 1e-4:
            return ""
        return (
            f". They are in {str(self.dtype).removeprefix('torch.')}, in which a step below "
            f"1/{1 / lost:.0f} of a γ is lost: train in float32 under torch.autocast, or keep the "
            "norms in float32"
        )
