"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest
import torch

from polarfast.engine.checkpoint import load_checkpoint, save_checkpoint, write_text
from polarfast.errors import FileFormatError
from polarfast.storage import write_atomically


def test_round_trip_without_running_code(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    state = {"tensor": torch.randn(3), "list": [{"a": 1, "b": 0.5}], "none": None, "text": "γ"}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == {"format": 1, **state}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def write(file: Path) -> None:
        file.write_text("half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_file_names_itself(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"tensor": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(FileFormatError, match="c.pt.*delete it"):
        load_checkpoint(path)


def test_other_version(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"format": 99})
    with pytest.raises(FileFormatError, match="another version"):
        load_checkpoint(path)
