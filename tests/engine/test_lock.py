"""One process at a time in a run's folder."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.engine import TINY

from polarfast.engine.campaigns.seeking import seek
from polarfast.engine.campaigns.trials import Trial, run_all
from polarfast.engine.launch import launch
from polarfast.engine.lock import LOCK, locked
from polarfast.errors import ArgumentError


def hold(folder: Path, ready: str) -> None:
    with locked(folder):
        Path(ready).touch()
        time.sleep(600)


@pytest.fixture
def held(tmp_path: Path):
    """A folder that another process works in, and the process."""
    folder, ready = tmp_path / "run", tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(folder, str(ready)))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield folder, process
    process.kill()
    process.join()


@pytest.mark.slow
def test_the_second_is_told_who_is_there(held):
    folder, process = held
    console = Console(file=None)
    for second in (
        lambda: launch(TINY, folder, console),
        lambda: seek(TINY, 0.5, folder, print),
        lambda: run_all([[Trial("one", TINY)]], folder, 1, print),
    ):
        with pytest.raises(ArgumentError, match=f"in use by process {process.pid} on "):
            second()
    assert [path.name for path in folder.iterdir()] == [LOCK]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(folder):  # at once: the lock went with its process
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert not folder.exists()  # nothing was written there


def test_what_is_in_the_folder_stays(tmp_path):
    (tmp_path / "mine.txt").touch()
    with locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with (
        pytest.raises(ArgumentError, match="cannot be the folder of a run"),
        locked(tmp_path / "mine.txt"),
    ):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with locked(tmp_path / "run"):
        assert "has no locks" in caplog.text


def test_one_process_has_a_folder_once(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(ArgumentError, match="in use by this process"), locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        pass
