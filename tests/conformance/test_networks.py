"""Every network of the suite × keep, expand, couple: the pruned network computes what the original
computes.

Which networks and whose pruner: see conformance/__init__.py.
"""

import pytest

from conformance import checks, oracles
from conformance.models import chosen, parameters
from conformance.pruners import FOLDS, MODES

# "none" and "bias" say little more of a network once "exact" holds in all modes.
SOME = [("keep", "exact"), ("expand", "exact"), ("couple", "exact")]
EVERY = [(mode, fold) for mode in MODES for fold in FOLDS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = metafunc.config.getoption("--models")
    # All tests of one network follow each other: it is built once.
    metafunc.parametrize("case", parameters(chosen(models)), scope="module")
    if "fold" in metafunc.fixturenames:
        metafunc.parametrize(("mode", "fold"), SOME if models in ("fast", "zoo") else EVERY)
    else:
        metafunc.parametrize("mode", MODES)


@pytest.mark.slow
def test_zero(pruner, case, mode):
    """γ = β = 0 on half of what is prunable: nothing may change, at any size."""
    _need(pruner, case, mode, "none")
    trial = checks.run(pruner, case, mode, "none", beta=True)
    checks.check_removed(trial)
    checks.check_counts(trial)
    assert max(trial.errors(beta=True)) < oracles.TOLERANCE
    assert not trial.pruned.inexact


@pytest.mark.slow
def test_beta(pruner, case, mode, fold):
    """γ = 0 with β ≠ 0: equal to the masked network at every size, or named as not equal."""
    _need(pruner, case, mode, fold)
    trial = checks.run(pruner, case, mode, fold, beta=False)
    checks.check_removed(trial)
    checks.check_counts(trial)
    errors = trial.errors(beta=fold == "none")
    assert (max(errors) > oracles.TOLERANCE) == bool(trial.pruned.inexact)
    assert max(errors) < oracles.TOLERANCE or fold == "bias" or not case.exact
    reported = pruner.report(trial.original, trial.pruned, trial.inputs)
    assert reported is None or (reported > oracles.TOLERANCE) == (errors[0] > oracles.TOLERANCE)


def _need(pruner, case, mode: str, fold: str) -> None:
    if mode not in case.modes:
        pytest.skip("all channels meet in additions")
    if mode not in pruner.modes or fold not in pruner.folds:
        pytest.skip(f"{pruner.name} does not offer {mode} with {fold}")
