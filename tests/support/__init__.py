"""What tests share: networks, oracles, backends, and harnesses for other processes."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
