"""Polarization and its rivals, as recipes that differ in nothing else."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from polarfast.engine.campaigns.trials import Trial
from polarfast.engine.recipe import Pruning, Recipe, Sparsity
from polarfast.errors import ArgumentError

#: Name on the command line -> name in tables.
METHODS = {
    "polarization": "polarization",
    "network-slimming": "network slimming (L1)",
    "deephoyer": "DeepHoyer",
    "uniform": "uniform width",
    "random": "random channels",
}
DENSE = "dense"
_REGULARIZERS = {"network-slimming": "l1", "deephoyer": "deephoyer"}


def method_recipe(recipe: Recipe, method: str, cut: float, lam: float | None = None) -> Recipe:
    """A recipe changed so that one method cuts a share of the MACs; all else stays.

    Polarization steers t until its valleys give the share. Network slimming and DeepHoyer take the
    percentile of |γ| that does, random choice and uniform width the share of every layer that does.
    Only polarization clamps γ.

    Args:
        method: one of ``METHODS``, or "dense", which is trained for as long and not pruned.
        lam: λ in place of the recipe's.
    """
    changes: dict[str, Any]
    sparsity = recipe.sparsity if lam is None else dataclasses.replace(recipe.sparsity, lam=lam)
    if method == "polarization":
        sparsity = dataclasses.replace(sparsity, regularizer="flops-target", cut=cut)
        pruning = dataclasses.replace(recipe.pruning, method="valley", value=None, cut=None)
    elif method in _REGULARIZERS:
        changes = {"regularizer": _REGULARIZERS[method], "upper": None, "clamp": "scales"}
        sparsity = dataclasses.replace(sparsity, **changes, cut=None)
        pruning = dataclasses.replace(recipe.pruning, method="percentile", value=None, cut=cut)
    elif method in ("uniform", "random"):
        sparsity = _plain(sparsity)
        changes = {"method": method, "value": None, "cut": cut}
        pruning = dataclasses.replace(recipe.pruning, **changes)
    elif method == DENSE:
        sparsity = _plain(sparsity)
        pruning = Pruning(method="none")
    else:
        known = ", ".join(METHODS)
        raise ArgumentError(f"methods: '{method}' is not known; choose from {known}")
    return dataclasses.replace(recipe, sparsity=sparsity, pruning=pruning)


def _plain(sparsity: Sparsity) -> Sparsity:
    """Training without a regularizer."""
    return dataclasses.replace(sparsity, regularizer="none", init=None, upper=None, cut=None)


def chains(
    recipe: Recipe,
    methods: Sequence[str],
    cuts: Sequence[float],
    seeds: int,
    lams: Mapping[str, float],
) -> list[list[Trial]]:
    """All trials; those of a chain share one sparsity training where it does not depend on the cut.

    The dense network shares its training with random choice.

    Raises:
        ArgumentError: a method that is not known, or something given twice.
    """
    for method in lams:
        method_recipe(recipe, method, 0.5)  # refuses what is not known
    if DENSE in methods:
        raise ArgumentError(f"methods: '{DENSE}' is compared with all others anyway; leave it out")
    for name, given in (("methods", methods), ("cuts", cuts)):
        if len(set(given)) < len(given):
            raise ArgumentError(f"{name}: {', '.join(map(str, given))}: one of them is given twice")
    found = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        seeded = dataclasses.replace(recipe, seed=seed)
        first = Trial(f"{DENSE}-seed{seed}", method_recipe(seeded, DENSE, 0.5))
        plain = [first]
        for method in methods:
            trials: list[Trial] = []
            for cut in cuts:
                changed = method_recipe(seeded, method, cut, lams.get(method))
                name = f"{method}-{100 * cut:g}-seed{seed}"
                alone = method in ("polarization", "uniform") or not trials
                trials.append(Trial(name, changed, None if alone else trials[0].name))
            if method == "random":
                plain += [dataclasses.replace(trial, trained=first.name) for trial in trials]
            elif method in ("polarization", "uniform"):
                found += [[trial] for trial in trials]
            else:
                found.append(trials)
        found.append(plain)
    return found
