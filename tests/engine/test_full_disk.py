"""A file that cannot be written whole: a sentence, nothing half there, the run goes on later."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.engine import TINY, assert_same, finish, launched, outcome, start

from polarfast.engine.recipe import to_yaml

#: Under a limit on file sizes a checkpoint ends as on a full disk, small text files do not.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from polarfast import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(TINY))
    command = [sys.executable, "-c", LIMITED, "run", str(recipe), "--out", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "the disk is full" in ended.stderr and "goes on from the last checkpoint" in ended.stderr
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert not list(folder.rglob("*.pt"))
    assert finish([start(launched, TINY, folder, {})]) == [0]
    whole = tmp_path / "whole"
    assert finish([start(launched, TINY, whole, {})]) == [0]
    assert_same(outcome(folder), outcome(whole))
