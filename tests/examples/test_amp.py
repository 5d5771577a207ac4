"""The mixed-precision example, both ways."""

import runpy

import pytest
from support.examples import EXAMPLES

pytestmark = pytest.mark.slow

EXAMPLE = EXAMPLES / "amp_loop.py"


@pytest.mark.parametrize("attach", [False, True])
def test_amp_loop(attach: bool) -> None:
    before, after, cut = runpy.run_path(str(EXAMPLE))["main"](attach, epochs=8)
    assert before > 0.95
    assert abs(after - before) < 0.01, "removed channels are constants, and those are kept"
    assert 0.4 < cut < 0.95
