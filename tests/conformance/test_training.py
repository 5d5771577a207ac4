"""A pruned network is like its original in all but size, trains on as the original would, and comes
back from its file bit for bit.

Which networks and whose pruner: see conformance/__init__.py.
"""

from dataclasses import replace

import pytest
import torch

from conformance import checks, oracles, reload, training
from conformance.models import ALL, chosen, parameters
from conformance.pruners import MODES, NotOffered

pytestmark = pytest.mark.slow

FAST = "resnet18|googlenet|mobilenet_v3_small|shufflenet_v2_x0_5|regnet_y_400mf"
#: Networks with outputs that exist in train mode only, and what these need to be able to run.
TRAIN_ONLY = {"googlenet": (3, 64, 64), "inception_v3": (3, 299, 299)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = metafunc.config.getoption("--models")
    if "case" in metafunc.fixturenames:
        cases = chosen(FAST if models == "fast" else models)
        # All tests of one network follow each other: it is built once.
        metafunc.parametrize("case", parameters(cases), scope="module")


def hardest(pruner, case) -> str:
    """The hardest mode that there is: networks × modes are test_networks'."""
    return next(m for m in ("expand", *MODES) if m in pruner.modes and m in case.modes)


@pytest.fixture
def mode(pruner, case) -> str:
    return hardest(pruner, case)


def offered(check, *args) -> None:
    try:
        check(*args)
    except NotOffered as error:
        pytest.skip(f"not offered: {error}")


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_a_further_training_step(pruner, case, mode, optimizer):
    offered(training.check_further_step, pruner, case, mode, optimizer)


def test_like_the_original(pruner, case, mode):
    shape = TRAIN_ONLY.get(case.name, case.shape)  # it is trained
    training.check_likeness(pruner, replace(case, shape=shape), mode)


def test_the_same_again(pruner, case, mode):
    offered(training.check_again, pruner, case, mode)


def test_files(pruner, request, tmp_path):
    """All networks in one process, which has not seen them before."""
    config = request.config
    names, before = [], {}
    models = config.getoption("--models")
    for case in chosen(FAST if models == "fast" else models):
        trial = checks.run(pruner, case, hardest(pruner, case), pruner.best_fold, beta=True)
        offered(pruner.save, trial.pruned, reload.file(tmp_path, case.name, "model"))
        torch.save(trial.probe, reload.file(tmp_path, case.name, "inputs"))
        names.append(case.name)
        before[case.name] = oracles.outputs(trial.pruned.model, trial.probe)
    reload.in_fresh_process(tmp_path, config.getoption("--pruner"), names)
    for name, wanted in before.items():
        got = torch.load(reload.file(tmp_path, name, "outputs"), weights_only=True)
        assert len(got) == len(wanted), name
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name


@pytest.mark.parametrize("name", TRAIN_ONLY)
def test_outputs_of_train_mode(pruner, name, request):
    """Auxiliary heads are pruned with the rest: the network left in train mode (its norms and
    dropout not, so that it can be compared) computes the same on all its outputs."""
    if name == "inception_v3" and request.config.getoption("--models") == "fast":
        pytest.skip("299 pixels take long: --models all")
    case = replace(ALL[name], heads=True, shape=TRAIN_ONLY[name])
    trial = checks.run(pruner, case, hardest(pruner, case), "none", True)
    checks.check_removed(trial)
    assert trial.pruned.model.training
    assert len(oracles.outputs(trial.original, trial.inputs)) > 1
    found = oracles.error(trial.original, trial.pruned.model, trial.probe)
    assert found < oracles.TOLERANCE
