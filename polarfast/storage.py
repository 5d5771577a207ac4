"""Files that are either whole or not there, and the first look at files that are read."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .errors import FileFormatError

#: Bytes of a text: the plan of a network with a million channels has 40 million.
MOST_TEXT = 2**26


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a file beside ``path``, bring it to disk, then move it into place.

    Whoever reads ``path``, after a kill or a power cut too, finds the old file or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            # What torch's writer says of a disk that is full.
            full = "could not be written whole, as where the disk is full"
            raise OSError(errno.ENOSPC, full, str(path)) from error
        raise
    sync_folder(path.parent)


def remove_partial(folder: Path, name: str) -> None:
    """Remove what :func:`write_atomically` of ``folder / name`` left when it was killed.

    Args:
        name: of the files; may hold wildcards.
    """
    for left_over in folder.glob(f".{name}.{'?' * 8}"):  # as tempfile.mkstemp names them
        left_over.unlink()


def open_file(path: str | os.PathLike[str], hint: str) -> IO[bytes]:
    """A file, open for reading.

    Args:
        hint: what a reader of the error should do.

    Raises:
        FileFormatError: it is no file (a folder, a pipe), or cannot be opened.
        FileNotFoundError: there is no such file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its other end
            raise FileFormatError(f"'{path}' is no file; {hint}")
        return open(path, "rb")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise FileFormatError(f"'{path}' cannot be read ({why}); {hint}") from error


def read_text(path: str | os.PathLike[str], hint: str, most: int = MOST_TEXT) -> str:
    """A text in UTF-8.

    Args:
        most: so many bytes.
        hint: what a reader of the error should do.

    Raises:
        FileFormatError: it is longer, no such text, or cannot be read.
        FileNotFoundError: there is no such file.
    """
    with open_file(path, hint) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FileFormatError(f"'{path}' is longer than {most:,} bytes; {hint}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"'{path}' is no text in UTF-8 (byte {error.start}: {error.reason}); {hint}"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Bring the names of the files in a folder to disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
