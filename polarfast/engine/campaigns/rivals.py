"""Polarization and its rivals: a recipe changed so that each cuts the same share of the MACs."""

import dataclasses
from typing import Any

from ...errors import ArgumentError
from ..recipe import Pruning, Recipe, Sparsity

#: Name on the command line -> name in tables.
METHODS = {
    "polarization": "polarization",
    "network-slimming": "network slimming (L1)",
    "deephoyer": "DeepHoyer",
    "no-penalty": "no penalty, smallest γ",
    "no-penalty-relative": "no penalty, smallest γ ÷ layer mean",
    "taylor": "no penalty, smallest Taylor score",
    "uniform": "uniform width",
    "random": "random channels",
}
DENSE = "dense"
_REGULARIZERS = {"network-slimming": "l1", "deephoyer": "deephoyer"}
#: Methods that train without a penalty -> how they prune.
PLAIN = {
    "no-penalty": "percentile",
    "no-penalty-relative": "relative",
    "taylor": "taylor",
    "uniform": "uniform",
    "random": "random",
}


def method_recipe(recipe: Recipe, method: str, cut: float, lam: float | None = None) -> Recipe:
    """A recipe changed so that one method cuts a share of the MACs; all else stays.

    Polarization steers itself until its valleys give the share. Network slimming, DeepHoyer and
    training without a penalty take the percentile of |γ| that does (or of |γ| in proportion to the
    layer's mean, or of the Taylor score), random choice and uniform width the share of every layer
    that does. Only polarization clamps γ.

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
    elif method in PLAIN:
        sparsity = _plain(sparsity)
        changes = {"method": PLAIN[method], "value": None, "cut": cut}
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
