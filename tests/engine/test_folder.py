"""Files that are whole or not there, and which of them stay."""

import os
from pathlib import Path

import pytest
import torch

from polarfast.engine.folder import (
    Artifacts,
    Checkpoints,
    load_checkpoint,
    save_tensors,
    write_text,
)
from polarfast.errors import ArgumentError, FileFormatError
from polarfast.storage import remove_partial, write_atomically


def numbers(checkpoints: Checkpoints) -> list[int]:
    return [int(path.stem) for path in checkpoints.numbered()]


def test_round_trip_without_running_code(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    state = {"tensor": torch.randn(3), "list": [{"a": 1, "b": 0.5}], "none": None, "text": "γ"}
    checkpoints.save(state)
    loaded = checkpoints.newest()
    assert loaded is not None
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded.pop("format") == 2 and loaded == state


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in range(1, 6):
        checkpoints.save({"number": number}, best="train" if number == 2 else None)
        assert numbers(checkpoints) == list(range(max(1, number - 1), number + 1))
    best = checkpoints.folder / "best-train.pt"
    assert load_checkpoint(best)["number"] == 2
    checkpoints.save({"number": 6}, best="train")
    assert load_checkpoint(best)["number"] == 6
    assert best.samefile(checkpoints.folder / "00000006.pt")  # no space for it twice
    assert {path.name for path in checkpoints.folder.iterdir()} == {
        *("00000005.pt", "00000006.pt", "best-train.pt")
    }
    checkpoints.clear()
    assert list(checkpoints.folder.iterdir()) == [] and checkpoints.newest() is None


def test_file_systems_without_second_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"number": 1}, best="train")
    assert load_checkpoint(checkpoints.folder / "best-train.pt")["number"] == 1
    state = checkpoints.newest()
    assert state is not None and state["number"] == 1


def test_killed_between_the_best_and_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is not newer than what the run goes on from by more than the epoch it repeats."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"number": 1})
    replace_file, moves = os.replace, []

    def killed_at_the_second(source: str, target: Path) -> None:
        moves.append(target.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"number": 2}, best="train")
    assert moves == ["best-train.pt", "00000002.pt"]
    state = checkpoints.newest()
    assert state is not None and state["number"] == 1


def test_torn_files_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number in (1, 2, 3):
        checkpoints.save({"number": number, "tensor": torch.zeros(1000)})
    files = checkpoints.numbered()
    files[2].write_bytes(files[2].read_bytes()[:1500])
    files[1].write_bytes(b"")
    state = checkpoints.newest()
    assert state is not None and state["number"] == 1
    assert "00000003.pt" in caplog.text and "00000002.pt" in caplog.text
    checkpoints.save({"number": 4})
    assert numbers(checkpoints) == [2, 3, 4]
    files[0].write_bytes(b"")
    for path in checkpoints.numbered():
        path.write_bytes(b"not one")
    with pytest.raises(FileFormatError, match="delete it"):
        checkpoints.newest()


def test_what_killed_writes_left_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({})
    left = [checkpoints.folder / name for name in (".00000002.pt.abcd_9xy", ".best-a.pt.12345678")]
    others = [checkpoints.folder / ".nfs000000001", checkpoints.folder / "notes.txt"]
    for path in left + others:
        path.write_text("half")
    checkpoints.save({})
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


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


def test_partial_files_are_known_by_their_names(tmp_path: Path) -> None:
    """Those of ``write_atomically`` at the moment of a kill, and no others."""
    seen: list[str] = []

    def note(file: Path) -> None:
        seen.append(file.name)
        (tmp_path / "copy").write_text(file.name)
        file.rename(tmp_path / file.name)
        os.link(tmp_path / file.name, tmp_path / f".plan.json.{'x' * 8}")

    write_atomically(tmp_path / "plan.json", note)
    (tmp_path / ".plan.json.keep").touch()
    remove_partial(tmp_path, "plan.json")
    assert sorted(os.listdir(tmp_path)) == [".plan.json.keep", "copy", "plan.json"]
    assert seen[0].startswith(".plan.json.") and len(seen[0]) == len(".plan.json.") + 8


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({}, best="train")
    modes = {path.stat().st_mode for path in checkpoints.folder.iterdir()}
    assert modes == {(tmp_path / "b").stat().st_mode}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_file_names_itself(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.pt"
    save_tensors(path, {"tensor": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(FileFormatError, match=r"c\.pt.*delete it"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"format": 99}, {"recipe": {}}, [1, 2]])
def test_other_version(tmp_path: Path, content: object) -> None:
    path = tmp_path / "c.pt"
    save_tensors(path, content)
    with pytest.raises(FileFormatError, match="another version"):
        load_checkpoint(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ArgumentError, match=r"file.* cannot be the folder of a run .*--out"):
            Artifacts(folder).prepare()


@pytest.mark.parametrize("place", ["header", "tensor", "list"])
def test_a_flipped_bit_in_the_newest_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    tensor = torch.arange(1000.0)
    for number in (1, 2):
        checkpoints.save({"number": number, "tensor": tensor})
    path = checkpoints.numbered()[-1]
    content = bytearray(path.read_bytes())
    start = content.index(tensor.numpy().tobytes())
    content[{"header": 8, "tensor": start + 403, "list": len(content) - 400}[place]] ^= 64
    path.write_bytes(content)
    state = checkpoints.newest()
    assert state is not None and state["number"] == 1 and torch.equal(state["tensor"], tensor)
    assert "00000002.pt" in caplog.text and "going on from the one before" in caplog.text
