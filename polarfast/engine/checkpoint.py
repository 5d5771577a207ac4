"""Files that are either whole or not there, and the checkpoint of a run."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from polarfast.errors import FileFormatError

FORMAT = 1


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a file beside ``path``, bring it to disk, then move it into place.

    Whoever reads ``path``, after a kill or a power cut too, finds the old file or the new one.
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` for text."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and strings, readable with ``torch.load(weights_only=True)``."""
    content = {"format": FORMAT, **state}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, without running code.

    Raises:
        FileFormatError: the file is damaged or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types for a damaged file
        raise FileFormatError(
            f"checkpoint '{path}' cannot be read ({type(error).__name__}); "
            "delete it to start the run again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileFormatError(
            f"checkpoint '{path}' is of another version; delete it to start the run again"
        )
    return state


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
