"""Runs before any test module is imported."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter: read when Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    suite = parser.getgroup("conformance", "which networks, whose pruner (tests/conformance)")
    suite.addoption("--models", default="fast", help="fast, all or a regular expression of names")
    suite.addoption("--pruner", default="conformance.pruners:Polarfast", help="module:Class")


@pytest.fixture(scope="session")
def pruner(request: pytest.FixtureRequest):
    from conformance.pruners import find

    return find(request.config.getoption("--pruner"))
