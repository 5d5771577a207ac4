"""Runs before any test module is imported."""

import os
from collections.abc import Callable

import pytest
from hypothesis import register_random

# One thread in this process and in those that tests start: workers beside each other keep the
# cores busy, and networks of eight channels gain nothing from a second thread.
os.environ["OMP_NUM_THREADS"] = "1"
# With AMX, low-precision products depend on how oneDNN lays out their operands, and two programs of
# one formula part: what is compared must not depend on the CPU's generation.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

import torch

torch.set_num_threads(1)
# The processes that tests start find the tests' modules too.
HERE = os.path.dirname(os.path.abspath(__file__))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
# Without a GPU the Triton kernels run in Triton's interpreter: read when Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class TorchRandom:
    """Torch's generator, which hypothesis seeds before each example: whatever a test draws from
    it is drawn again when the example is.
    """

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


register_random(TorchRandom)


def pytest_collectstart(collector: pytest.Collector) -> None:
    torch.manual_seed(0)  # what a module draws does not depend on those imported before it


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # nor what a test draws on those that ran before it
    torch.set_num_threads(1)  # some recipes ask for more


def pytest_addoption(parser: pytest.Parser) -> None:
    suite = parser.getgroup("conformance", "which networks, whose pruner (tests/conformance)")
    suite.addoption("--models", default="fast", help="fast, all or a regular expression of names")
    parser.addoption(
        "--faults", type=int, default=12, help="damaged files of each kind (tests/faults)"
    )
    suite.addoption("--pruner", default="conformance.pruners:Polarfast", help="module:Class")


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> int:
    """How many damaged files of each kind a test makes."""
    return request.config.getoption("--faults")


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a figure, past pytest's capture, where there are many tries."""

    def tell(line: str) -> None:
        if request.config.getoption("--faults") > 12:
            with request.config.pluginmanager.getplugin(
                "capturemanager"
            ).global_and_fixture_disabled():
                print(f"\n{line}", flush=True)

    return tell


@pytest.fixture(scope="session")
def pruner(request: pytest.FixtureRequest):
    from conformance.pruners import find

    return find(request.config.getoption("--pruner"))
