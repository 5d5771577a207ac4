"""One process at a time in a folder: :func:`locked`."""

import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArgumentError
from .distributed import Workers

_log = logging.getLogger(__name__)

LOCK = ".lock"
POLL_SECONDS = 0.2
#: After so long it is said that another process is waited for.
SILENT_SECONDS = 3.0
#: Folders that this process has: the system's lock is between processes.
_HELD: set[Path] = set()
#: What file systems without locks answer.
_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, workers: Workers | None = None, patience: float = 0.0) -> Iterator[None]:
    """Inside the block no other process that asks for this folder gets it.

    The operating system's lock on a file in the folder: it ends with its process, however that
    ends, and holds on network file systems too. Processes forked from this one do not inherit it.

    Args:
        folder: made if it is not there, and removed again if it is left empty.
        workers: of a run of several processes: the first one locks for all.
        patience: seconds to wait for another process that has it.

    Raises:
        ArgumentError: another process works in the folder; the message says which. Or the folder
            cannot be made or written to.
    """
    descriptor, problem = None, None
    mine = folder.absolute()
    if workers is None or workers.first:
        try:
            if mine in _HELD:
                raise ArgumentError(
                    f"'{folder}' is in use by this process, in another thread or further out: name "
                    "another folder with --out"
                )
            descriptor = _take(folder, time.monotonic() + patience)
            _HELD.add(mine)
        except ArgumentError as error:
            problem = str(error)
    problems = [problem] if workers is None else workers.gather(problem)
    found = next(filter(None, problems), None)
    if found is not None:
        raise ArgumentError(found)
    try:
        yield
    finally:
        if descriptor is not None:
            _HELD.discard(mine)
            _let_go(folder, descriptor)


def _take(folder: Path, deadline: float) -> int:
    """An open file that is this process's alone."""
    path = folder / LOCK
    started, said = time.monotonic(), False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ArgumentError(
                f"'{folder}' cannot be the folder of a run ({error.strerror}): name another one "
                "with --out"
            ) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            now = time.monotonic()
            if error.errno not in _NONE and now < deadline:
                if not said and now > started + SILENT_SECONDS:
                    left = math.ceil(deadline - now)
                    _log.warning(
                        "'%s' is in use by %s: waiting, for %d s at most", folder, holder, left
                    )
                    said = True
                time.sleep(POLL_SECONDS)
                continue
            if error.errno not in _NONE:
                raise ArgumentError(
                    f"'{folder}' is in use by {holder}: wait until it ends, stop it, or name "
                    "another folder with --out"
                ) from error
            _log.warning(
                "the file system of '%s' has no locks (%s): see to it that no second run works "
                "there",
                *(folder, error.strerror),
            )
            return os.open(path, os.O_RDWR)
        # Whoever held it may have removed it after it was opened here.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    me = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    with suppress(OSError):  # a courtesy to the next one, for which the disk may be too full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(me).encode())
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.read(descriptor, 1000))
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _let_go(folder: Path, descriptor: int) -> None:
    with suppress(OSError):
        (folder / LOCK).unlink()
    os.close(descriptor)
    with suppress(OSError):
        folder.rmdir()  # nothing was written
