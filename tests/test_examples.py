"""The examples run and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop() -> None:
    before, after, cut = example("plain_loop").main(epochs=10)
    assert before > 90 and abs(after - before) <= 1
    assert 0.1 < cut < 0.9
