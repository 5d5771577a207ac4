"""The checkpoint of a run, and its small text files."""

from pathlib import Path
from typing import Any

import torch

from polarfast.errors import FileFormatError
from polarfast.storage import read_tensors, write_atomically

FORMAT = 1


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
    state = read_tensors(path, "delete it to start the run again")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileFormatError(
            f"checkpoint '{path}' is of another version; delete it to start the run again"
        )
    return state
