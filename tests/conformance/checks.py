"""The assertions on one network's function, shared by the tests and by the script that writes
docs/models.md.
"""

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from . import oracles
from .case import Case
from .pruners import MODES, Channels, Pruned, Pruner


@dataclass
class Trial:
    """A network before and after.

    Attributes:
        original: the network, with γ (and β, in the zero test) 0 on the channels asked for.
        asked: those channels.
        pruned: what became of it.
        inputs: the example inputs that the pruner was given.
        probe: inputs that it was not given.
        elsewhere: inputs of another size, where the network takes one.
    """

    original: nn.Module
    asked: Channels
    pruned: Pruned
    inputs: Tensor
    probe: Tensor
    elsewhere: Tensor | None

    def errors(self, beta: bool) -> list[float]:
        """Against the original with γ (and with `beta` β) 0 on what is gone: on `probe` and, where
        there is one, `elsewhere`.
        """
        reference = oracles.masked(self.original, self.pruned.removed, beta)
        return [
            oracles.error(reference, self.pruned.model, inputs)
            for inputs in (self.probe, self.elsewhere)
            if inputs is not None
        ]


@lru_cache(maxsize=1)
def _prepared(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build().eval()
    model.training = case.heads
    return oracles.randomize(model, case.inputs(batch=4))


@lru_cache(maxsize=len(MODES))
def _prunable(pruner: Pruner, case: Case, mode: str) -> list[str]:
    return pruner.prunable(prepared(case), case.inputs(), mode)


def prepared(case: Case) -> nn.Module:
    """The network in a random state, float64, eval mode; a copy of its own for every caller."""
    return copy.deepcopy(_prepared(case))


def zeroed(pruner: Pruner, case: Case, mode: str, beta: bool) -> tuple[nn.Module, Channels, Tensor]:
    """The network with half of what is prunable at γ = 0 (with `beta`, at γ = β = 0 wherever the
    channels pass), those channels, and example inputs."""
    model, inputs = prepared(case), case.inputs()
    asked = oracles.half(model, _prunable(pruner, case, mode))
    assert asked, "nothing is prunable"
    oracles.set_zero(model, asked, beta)
    if beta:
        oracles.silence(model, case.inputs(seed=5))
        asked = oracles.zeros(model, asked)
    return model, asked, inputs


def run(pruner: Pruner, case: Case, mode: str, fold: str, beta: bool) -> Trial:
    """Zero (see `zeroed`) and prune."""
    model, asked, inputs = zeroed(pruner, case, mode, beta)
    pruned = pruner.prune(copy.deepcopy(model), inputs, mode, asked, fold)
    elsewhere = None if case.other is None else replace(case, shape=case.other).inputs(seed=9)
    return Trial(model, asked, pruned, inputs, case.inputs(batch=4, seed=9), elsewhere)


def check_removed(trial: Trial) -> None:
    """Something went, and nothing that was not asked for."""
    assert any(gone.numel() for gone in trial.pruned.removed.values()), "nothing was removed"
    for name, gone in trial.pruned.removed.items():
        strangers = set(gone.tolist()) - set(trial.asked.get(name, torch.empty(0)).tolist())
        assert not strangers, f"{name}: removed {sorted(strangers)}, which nobody asked for"


def check_counts(trial: Trial) -> None:
    """Smaller, and as small as predicted, to the last one."""
    model, pruned = trial.pruned.model, trial.pruned
    macs, params = oracles.count_macs(model, trial.inputs), oracles.count_params(model)
    assert macs < oracles.count_macs(trial.original, trial.inputs)
    assert params < oracles.count_params(trial.original)
    assert pruned.macs in (None, macs)
    assert pruned.params in (None, params)
