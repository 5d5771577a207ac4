"""Random networks, γ and sizes: an exact slim model, an inexact one that is named, or a refusal."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nets import settle
from support.random_nets import Program

import polarfast as pf

#: Of one run; POLARFAST_NETWORKS=5000 for a long one.
NETWORKS = int(os.environ.get("POLARFAST_NETWORKS", "60"))


def prune(seed: int, residual: str, share: float, side: int, fold: str = "exact") -> str:
    """What came of one network: "exact", "named" or "refused"."""
    model = settle(Program(seed), torch.rand(4, 3, 16, 16), seed=seed)
    x = torch.rand(2, 3, side, side, dtype=torch.float64)
    try:
        scales = pf.scaling_factors(model, x, residual=residual)
    except pf.TracingError as error:
        assert "no scaling factor can take part" in str(error)
        return "refused"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[torch.rand(gamma.numel(), generator=generator) < share] = 0
    plan = pf.plan(model, x, scales, "fixed", value=0.0, fold=fold)
    slim = pf.slim(model, plan)
    assert plan.params == sum(param.numel() for param in slim.parameters())
    if plan.inexact:
        return "named"
    if fold != "exact":
        return "checked by slim"
    with torch.no_grad():
        for height, width in ((side, side), (24, 40), (16, 32)):
            images = torch.rand(2, 3, height, width, dtype=torch.float64)
            torch.testing.assert_close(slim(images), model(images), rtol=1e-7, atol=1e-7)
    return "exact"


@settings(max_examples=NETWORKS, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    residual=st.sampled_from(["keep", "expand", "expand-all", "couple"]),
    share=st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    side=st.sampled_from([16, 32]),
)
def test_exact_or_named_or_refused(seed, residual, share, side):
    assert prune(seed, residual, share, side) in ("exact", "named", "refused")


def test_most_are_pruned_exactly():
    found = [prune(seed, "expand", 0.5, 16) for seed in range(12)]
    assert found.count("exact") >= 6


@pytest.mark.parametrize("fold", ["none", "bias"])
def test_other_folds_build(fold):
    found = {prune(seed, "keep", 0.5, 16, fold) for seed in range(6)}
    assert "checked by slim" in found or fold == "bias"
