"""Files that are either whole or not there, and that run no code when they are read."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import FileFormatError


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


def read_tensors(path: str | os.PathLike[str], hint: str) -> Any:
    """What `torch.save` wrote, on the CPU, without running code from it.

    Args:
        path: the file.
        hint: what a reader of the error should do.

    Raises:
        FileFormatError: the file is damaged, or holds more than tensors and plain data.
        FileNotFoundError: there is no such file.
    """
    import torch  # here alone: the command line's options need none of it

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises half a dozen unrelated types for a damaged file
        raise FileFormatError(
            f"'{path}' cannot be read, it is damaged or no file of polarfast's "
            f"({type(error).__name__}); {hint}"
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
