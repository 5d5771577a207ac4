"""The examples run and do what they say."""

import pytest
from support.examples import example

pytestmark = pytest.mark.slow


def test_plain_loop() -> None:
    before, after, cut = example("plain_loop").main(epochs=10)
    assert before > 90 and abs(after - before) <= 1
    assert 0.1 < cut < 0.9
