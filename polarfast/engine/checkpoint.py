"""The checkpoints of a run, and its small text files."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from polarfast.errors import FileFormatError
from polarfast.storage import read_tensors, remove_partial, write_atomically

FORMAT = 2
FOLDER = "checkpoints"
_log = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` for text."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors, numbers and strings, readable with ``torch.load(weights_only=True)``."""
    write_atomically(path, lambda file: torch.save(content, file))


def _duplicate(path: Path, to: Path) -> None:
    """A second name for a file where the file system has such, else a copy."""

    def write(file: Path) -> None:
        file.unlink()
        try:
            os.link(path, file)
        except OSError:
            shutil.copyfile(path, file)

    write_atomically(to, write)


class Checkpoints:
    """The numbered checkpoints in a run's folder: the newest few, and the best of each stage.

    Args:
        run: the run's folder.
        keep: how many of the newest stay.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder = run / FOLDER
        self.keep = keep

    def numbered(self) -> list[Path]:
        """Files, oldest first."""
        return sorted(self.folder.glob("[0-9]" * 8 + ".pt"))

    def save(self, state: dict[str, Any], best: str | None = None) -> None:
        """Write a state, then remove what is too old.

        Args:
            best: name of a stage whose best state this one is, kept as ``best-NAME.pt`` too.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partial(self.folder, "*.pt")
        files = self.numbered()
        number = int(files[-1].stem) + 1 if files else 1
        path = self.folder / f"{number:08d}.pt"
        content = {"format": FORMAT, **state}
        if best is None:
            save_tensors(path, content)
        else:
            # The best comes first: a run killed between the two repeats the epoch and both writes.
            save_tensors(self.folder / f"best-{best}.pt", content)
            _duplicate(self.folder / f"best-{best}.pt", path)
        for old in self.numbered()[: -self.keep]:
            old.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest state that can be read; None where there is no checkpoint at all.

        Raises:
            FileFormatError: there are checkpoints and none of them can be read.
        """
        files = self.numbered()
        for path in reversed(files):
            try:
                return load_checkpoint(path)
            except FileFormatError as error:
                if path == files[0]:
                    raise
                _log.warning("%s; going on from the one before", error)
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        for path in [*self.numbered(), *self.folder.glob("best-*.pt")]:
            path.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint, without running code.

    Raises:
        FileFormatError: the file is damaged or of another version.
    """
    state = read_tensors(path, "delete it to go on from an earlier one, or from the start")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileFormatError(
            f"checkpoint '{path}' is of another version; delete it to start the run again"
        )
    return state
