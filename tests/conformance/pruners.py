"""What the suite asks of a pruning library, and polarfast's answer."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polarfast as pf

MODES = ("keep", "expand", "couple")
FOLDS = ("none", "bias", "exact")
#: BatchNorm weight's name -> int64 [K], ascending channel numbers of the original network.
Channels = Mapping[str, Tensor]


@dataclass
class Pruned:
    """A pruned network and what the library says of it.

    Attributes:
        model: the network.
        removed: the channels that are gone. A channel of a BatchNorm whose input is gone with them
            (behind a depthwise convolution) may be left out.
        macs, params: predicted, on the example inputs; None: the library predicts none.
        inexact: layers for which the library says that it does not keep the function; name -> why.
        handle: whatever the library needs to do the same again.
    """

    model: nn.Module
    removed: dict[str, Tensor]
    macs: int | None = None
    params: int | None = None
    inexact: dict[str, str] = field(default_factory=dict)
    handle: Any = None


class NotOffered(Exception):
    """The library does not claim to do this: the test is skipped."""


class Pruner(ABC):
    """A pruning library. Models are in float64 or float32, on the CPU, in eval mode unless a test
    says otherwise."""

    #: As in tables.
    name: str
    #: What may happen to channels that meet in an addition: left alone ("keep"), a branch pruned
    #: and put back at its places ("expand"), removed together ("couple").
    modes: tuple[str, ...] = MODES
    #: What may happen to a removed channel's β: dropped with γ ("none"), kept as if without zero
    #: padding ("bias"), kept exactly where that is possible ("exact").
    folds: tuple[str, ...] = FOLDS

    @abstractmethod
    def prunable(self, model: nn.Module, inputs: Any, mode: str) -> list[str]:
        """Names of the BatchNorm weights (γ) whose channels the library may remove."""

    @abstractmethod
    def prune(
        self,
        model: nn.Module,
        inputs: Any,
        mode: str,
        channels: Channels,
        fold: str,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Pruned:
        """Remove these channels (their γ is 0) as far as the library can, and no others. `model`
        is the suite's to throw away, so pruning in place is fine.

        Args:
            fold: one of `folds`.
            optimizer: of the model's parameters, to go on with the pruned model's; raise
                `NotOffered` if the library leaves this to its user.
        """

    def again(self, model: nn.Module, pruned: Pruned) -> nn.Module:
        """The same channels removed from another network built alike, with other weights."""
        raise NotOffered

    def save(self, pruned: Pruned, path: Path) -> None:
        """Write the pruned model to a file that `load` reads without running code from it."""
        raise NotOffered

    def load(self, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
        """Read it back in another process."""
        raise NotOffered

    def report(self, model: nn.Module, pruned: Pruned, inputs: Any) -> float | None:
        """The error, as a share of the output's variation, that the library itself reports, if it
        does."""
        return None

    @property
    def best_fold(self) -> str:
        """The one that keeps most."""
        return next(fold for fold in reversed(FOLDS) if fold in self.folds)


class Polarfast(Pruner):
    name = "polarfast"

    def prunable(self, model: nn.Module, inputs: Any, mode: str) -> list[str]:
        return list(pf.scaling_factors(model, inputs, residual=mode))

    def prune(
        self,
        model: nn.Module,
        inputs: Any,
        mode: str,
        channels: Channels,
        fold: str,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Pruned:
        scales = pf.scaling_factors(model, inputs, residual=mode)
        plan = pf.plan(model, inputs, scales, method="fixed", value=0.0, fold=fold)
        slim = pf.slim(model, plan, verify=False, optimizer=optimizer)
        removed = {name: _rest(scales[name].numel(), kept) for name, kept in plan.kept.items()}
        return Pruned(slim, removed, plan.macs, plan.params, plan.inexact, plan)

    def again(self, model: nn.Module, pruned: Pruned) -> nn.Module:
        plan = pf.PruningPlan.from_json(pruned.handle.to_json())
        return pf.slim(model, plan, verify=False)

    def save(self, pruned: Pruned, path: Path) -> None:
        pf.save(pruned.model, pruned.handle, path)

    def load(self, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
        return pf.load(path, build)

    def report(self, model: nn.Module, pruned: Pruned, inputs: Any) -> float | None:
        report = pf.verify(model, pruned.model, pruned.handle, inputs)
        assert report.notes == pruned.inexact
        return report.rel_error


def _rest(count: int, kept: Tensor) -> Tensor:
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def find(spec: str) -> Pruner:
    """The pruner that "package.module:Class" names."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)()
