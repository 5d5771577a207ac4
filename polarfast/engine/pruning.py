"""From a recipe's settings to regularizers and plans, the paper's and its rivals'."""

import warnings

import torch
from torch import Tensor, nn

import polarfast as pf

from .recipe import Pruning, Sparsity
from .seeds import mix

KEEP_EVERYTHING = Pruning(method="none")


def regularizer(
    model: nn.Module,
    example: Tensor,
    scales: pf.ScalingFactors,
    sparsity: Sparsity,
    pruning: Pruning,
    steps: int,
) -> pf.Regularizer | None:
    """What a recipe's ``sparsity`` asks for; None for "none".

    Args:
        scales: all that are pruned. steps: optimizer steps of the stage.
    """
    lam, upper, clamp = sparsity.lam, sparsity.upper, sparsity.clamp
    if sparsity.regularizer == "l1":
        return pf.L1(lam, upper=upper, clamp=clamp)
    if sparsity.regularizer == "deephoyer":
        return pf.DeepHoyer(lam, upper=upper, clamp=clamp)
    if sparsity.regularizer == "polarization":
        return pf.Polarization(lam, sparsity.t, upper=upper, mean=sparsity.mean, clamp=clamp)
    if sparsity.regularizer == "flops-target":
        assert sparsity.cut is not None and upper is not None  # Sparsity checks
        return pf.FlopsTarget(
            model,
            example,
            scales,
            cut=sparsity.cut,
            lam=lam,
            upper=upper,
            clamp=clamp,
            steps=steps,
            fold=pruning.fold,
            round_to=pruning.round_to,
            min_channels=pruning.min_channels,
        )
    return None


def predictor(
    model: nn.Module, example: Tensor, scales: pf.ScalingFactors, pruning: Pruning
) -> pf.CutPredictor:
    """Predicts the share of the MACs cut while training goes on.

    Where the share is set beforehand (``pruning.cut``), it is what γ below 0.01 would save.
    """
    settled = pruning.cut is not None or pruning.method == "none"
    return pf.CutPredictor(
        model,
        example,
        scales,
        method="fixed" if settled else pruning.method,
        value=None if settled else pruning.value,
        fold=pruning.fold,
        round_to=pruning.round_to,
        min_channels=pruning.min_channels,
    )


def make_plan(
    model: nn.Module, example: Tensor, scales: pf.ScalingFactors, pruning: Pruning, seed: int
) -> pf.PruningPlan:
    """The plan that a recipe's ``pruning`` asks for, of the network as it is now."""
    method, value = pruning.method, pruning.value
    scores = None
    if method == "none":
        method, value = "percentile", 0.0
    elif pruning.cut is not None:
        scores = _scores(scales, pruning.method, seed)
        method = "percentile"
        predict = pf.CutPredictor(
            model,
            example,
            scales,
            method="fixed",  # only asked for the percentile below
            fold=pruning.fold,
            round_to=pruning.round_to,
            min_channels=pruning.min_channels,
        )
        value = predict.percentile_for(pruning.cut, scores)
    with warnings.catch_warnings():
        if scores is not None:  # layers of equal width have equal scores, which go together
            warnings.filterwarnings("ignore", message="percentile")
        return pf.plan(
            model,
            example,
            scales,
            method=method,
            value=value,
            fold=pruning.fold,
            round_to=pruning.round_to,
            min_channels=pruning.min_channels,
            scores=scores,
        )


def _scores(scales: pf.ScalingFactors, method: str, seed: int) -> dict[str, Tensor] | None:
    """Scores in (0, 1] whose percentile takes the same share of every layer; None: γ decide."""
    if method == "percentile":
        return None
    generator = torch.Generator().manual_seed(mix(seed, len(scales)))
    scores = {}
    for name, gamma in scales.items():
        count = gamma.numel()
        ranks = torch.arange(count, 0, -1)
        if method == "random":
            ranks = ranks[torch.randperm(count, generator=generator)]
        scores[name] = ranks.float() / count
    return scores
