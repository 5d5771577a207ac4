"""Other libraries behind the suite's interface, each used as its documentation shows."""

from typing import Any

import torch
from torch import nn

from . import oracles
from .pruners import Channels, NotOffered, Pruned, Pruner


class TorchPruning(Pruner):
    """torch-pruning's `BNScalePruner`, half of every layer, in place. What is added together goes
    together; β of removed channels is dropped. It chooses by γ on its own, so that what it removes
    is what the suite asks for where γ = 0 on half of every layer and it sees the same layers."""

    name = "torch-pruning"
    modes = ("couple",)
    folds = ("none",)

    def prunable(self, model: nn.Module, inputs: Any, mode: str) -> list[str]:
        import torch_pruning as tp

        graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
        names = {module: name for name, module in oracles.norms(model).items()}
        found = {
            names[item.dep.target.module]
            for group in graph.get_all_groups()
            for item in group
            if item.dep.target.module in names
        }
        return sorted(found)

    def prune(
        self,
        model: nn.Module,
        inputs: Any,
        mode: str,
        channels: Channels,
        fold: str,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Pruned:
        import torch_pruning as tp

        if optimizer is not None:
            raise NotOffered("parameters are replaced, the optimizer is left to the user")
        before = oracles.variances(model)
        # Layers of which nothing is to go: those without any γ = 0, in channels' norms and behind.
        spared = [norm for norm in oracles.norms(model).values() if not (norm.weight == 0).any()]
        tp.pruner.BNScalePruner(
            model,
            inputs,
            importance=tp.importance.BNScaleImportance(),
            pruning_ratio=0.5,
            ignored_layers=spared,
        ).step()
        return Pruned(model, oracles.gone(before, model))


class Kirigami(Pruner):
    """torch-kirigami: one plan for all channels, in place. What is added together goes together;
    β of removed channels is dropped."""

    name = "torch-kirigami"
    modes = ("couple",)
    folds = ("none",)

    def prunable(self, model: nn.Module, inputs: Any, mode: str) -> list[str]:
        from torch_kirigami import DependencyGraph
        from torch_kirigami.pruning import Pruner as Planner

        planner = Planner(model, graph=DependencyGraph.build(model, args=(inputs,)))
        parameters = {ref.paths[0]: ref for ref, _ in planner.graph.tensor_bindings() if ref.paths}
        return [name for name in oracles.norms(model) if self._goes(planner, parameters[name])]

    @staticmethod
    def _goes(planner: Any, parameter: Any) -> bool:
        from torch_kirigami.pruning import PlanningError

        try:
            planner.plan_remove([_select(parameter, range(1))])
        except PlanningError:
            return False
        return True

    def prune(
        self,
        model: nn.Module,
        inputs: Any,
        mode: str,
        channels: Channels,
        fold: str,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Pruned:
        from torch_kirigami import DependencyGraph
        from torch_kirigami.pruning import Pruner as Planner

        if optimizer is not None:
            raise NotOffered("parameters are replaced, the optimizer is left to the user")
        before = oracles.variances(model)
        graph = DependencyGraph.build(model, args=(inputs,))
        parameters = {ref.paths[0]: ref for ref, _ in graph.tensor_bindings() if ref.paths}
        seeds = [_select(parameters[name], gone.tolist()) for name, gone in channels.items()]
        planner = Planner(model, graph=graph)
        small, _ = planner.apply(planner.plan_remove(seeds))
        return Pruned(small, oracles.gone(before, small))


def _select(parameter: Any, channels: Any) -> Any:
    from torch_kirigami import IndexSet, Region, Selection

    return Selection(parameter, (Region((IndexSet.of(channels),)),))
