"""The network of a sparsity training is made smaller while it trains, as far as its γ are at 0."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import polarfast as pf

from ..errors import FileFormatError
from ..planning.pruning_plan import PruningPlan
from ..slimming.origin import Origin
from ..slimming.slim import SlimInfo, info_of, rebuild
from ..steering.flops_target import AT_ZERO
from . import distributed
from .networks import Networks
from .trainer import Trainer

#: A smaller share of the first network's MACs is not worth making a new one for.
WORTH = 0.1


class Shrinking:
    """After an epoch, replaces the network that trains by its slim form where that computes the
    same for at least ``WORTH`` fewer MACs; optimizer, averages and wrappers go along.

    The network that training began with stays beside it: predictions are made for it, and each slim
    form is made from it anew, after the trained weights were written back (``Origin``). What comes
    after the training never knows.

    Args:
        networks: of the run.
        dense: the network as training begins with it, not wrapped; scales: all of its γ that may be
            pruned.
        regularizer: steers the training.
        note: told of each new network, and why there is none.

    Attributes:
        left: the share of the first network's MACs that the network of now computes.
        slim: the network of now; None: it is still the first.
    """

    def __init__(
        self,
        networks: Networks,
        dense: nn.Module,
        scales: pf.ScalingFactors,
        regularizer: pf.FlopsTarget,
        note: Callable[[str], None],
    ) -> None:
        self._networks, self._dense, self._scales = networks, dense, scales
        self._regularizer, self._note = regularizer, note
        self._at_zero = networks.at_zero(dense, scales)
        self._possible = True
        self.left = 1.0
        self.slim: nn.Module | None = None

    def state_dict(self) -> dict[str, Any] | None:
        """What the network of now is, apart from its tensors; None: still the first."""
        if self.slim is None:
            return None
        return {"left": self.left, "info": info_of(self.slim).to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> nn.Module:
        """The network to go on with, its tensors to be loaded."""
        try:
            info = SlimInfo.from_json(state["info"])
        except ValueError as error:
            raise FileFormatError(
                f"the checkpoint describes no smaller network ({error}); delete it"
            ) from error
        self.slim = rebuild(self._networks.fresh()[0], info)
        self.left = state["left"]
        return self.slim

    def factors(self) -> pf.ScalingFactors:
        """The γ of the network of now that the regularizer acts on."""
        assert self.slim is not None
        found = self._regularizer.follow(self.slim)
        pattern = self._networks.recipe.sparsity.regularize
        return found.select(pattern) if pattern else found

    def write_back(self) -> nn.Module:
        """The first network, which now computes what the network of now does."""
        if self.slim is not None:
            _origin(self.slim).write_back(self.slim, self._dense)
        return self._dense

    def keep_up(self) -> None:
        """Give the first network the γ and β of now, which is all that predictions read."""
        self._regularizer.keep_up()

    def after_epoch(self, trainer: Trainer) -> None:
        """Give the trainer a smaller network, if it is worth it. All processes come to the same."""
        if not self._possible:
            return
        self.write_back()
        scores = self._scores(trainer)
        if self._at_zero.cut(scores) - (1 - self.left) < WORTH:
            return
        plan = self._networks.plan_at_zero(self._dense, self._scales, scores)
        if plan.inexact:
            reader, why = next(iter(plan.inexact.items()))
            self._refuse(f"what removed channels leave behind does not fold into {reader}: {why}")
            return
        if plan.flops_reduction - (1 - self.left) < WORTH:
            return
        self._replace(trainer, plan)

    def _scores(self, trainer: Trainer) -> dict[str, Tensor]:
        """γ of the network that trains; more than 0 too where the averaged one is not near 0."""
        scores = {name: gamma.detach().abs().float() for name, gamma in self._scales.items()}
        if trainer.average is None:
            return scores
        with trainer.averaged():
            self.write_back()
            for name, gamma in self._scales.items():
                averaged = gamma.detach().abs().float()
                scores[name] = scores[name] + averaged * (averaged > AT_ZERO)
        self.write_back()
        return scores

    def _replace(self, trainer: Trainer, plan: PruningPlan) -> None:
        optimizer, training = trainer.optimizer, trainer.model.training
        groups = [list(group["params"]) for group in optimizer.param_groups]
        state = dict(optimizer.state)
        if self.slim is not None:
            _origin(self.slim).restore_optimizer(optimizer, self.slim, self._dense)
        small = pf.slim(self._dense, plan, optimizer=optimizer)
        averages = self._averages(trainer, plan)
        lacks = _origin(small).created
        if lacks or (averages is not None and not _alike(averages, small)):
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
            optimizer.state.clear()
            optimizer.state.update(state)
            if lacks:
                self._refuse(f"it would need a bias of its own in {lacks[0].rpartition('.')[0]}")
            return
        before, self.left = self.left, 1 - plan.flops_reduction
        self.slim = distributed.prepare(small, trainer.recipe, trainer.workers).train(training)
        trainer.replace(self.slim, self.factors(), averages)
        self._note(
            f"The network that trains is now its slim form: {100 * self.left:.0f} % of the MACs, "
            f"{100 * before:.0f} % before, and the same output"
        )

    def _averages(self, trainer: Trainer, plan: PruningPlan) -> nn.Module | None:
        """The slim form of the averaged weights."""
        if trainer.average is None:
            return None
        with trainer.averaged():
            self.write_back()
            with torch.no_grad():
                for name, gamma in self._scales.items():
                    gone = torch.ones(gamma.numel(), dtype=torch.bool)
                    gone[plan.kept[name]] = False
                    gamma[gone.to(gamma.device)] = 0
            # Its text has no memory of the other weights.
            averages = pf.slim(self._dense, PruningPlan.from_json(plan.to_json()))
        self.write_back()
        return averages

    def _refuse(self, why: str) -> None:
        self._possible = False
        self._note(f"The network is not made smaller while it trains: {why}")


def _origin(slim: nn.Module) -> Origin:
    origin = info_of(slim).origin
    assert origin is not None  # made here, or by a checkpoint of what was made here
    return origin


def _alike(first: nn.Module, second: nn.Module) -> bool:
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(mine[n].shape == other[n].shape for n in mine)
