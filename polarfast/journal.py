"""A journal of finished trials: one JSON line each, on disk before the next one starts."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from .errors import ArgumentError, FileFormatError
from .storage import sync_folder

FORMAT, VERSION = "polarfast-search", 1
_log = logging.getLogger(__name__)


class Journal:
    """A file of JSON lines: a header with the settings, then one line for each entry.

    A process killed while it writes leaves a torn last line, which the next one drops.

    Args:
        path: the file; made if it is not there. None: nothing is written.
        settings: what entries depend on.

    Attributes:
        entries: those that were in the file.

    Raises:
        ArgumentError: the file was written with other settings, which the message names; or it
            cannot be a file there.
        FileFormatError: the file is no journal, or is damaged before its last line.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.entries: list[dict[str, Any]] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ArgumentError(
                f"journal={str(path)!r}: there is no folder {str(self.path.parent)!r}; make it "
                "first, or name another file"
            )
        if self.path.is_dir():
            raise ArgumentError(f"journal={str(path)!r} is a folder: name a file in it")
        header = {"format": FORMAT, "version": VERSION, "settings": settings}
        lines = self._whole_lines(self.path) if self.path.exists() else []
        if lines:
            self._check(lines[0], settings)
            self.entries = lines[1:]
        if self.path.exists():
            self._drop_torn_line(self.path)
        if not lines:
            self._write(header)

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry; it is on disk when this returns."""
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self.path.parent)

    def _whole_lines(self, path: Path) -> list[dict[str, Any]]:
        """The entries in the file, which is left as it is: it may be somebody else's."""
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        beginning = f'{{"format": "{FORMAT}"'.encode()
        if content[: len(beginning)] != beginning[: len(content)]:
            raise self._foreign()
        lines = []
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise FileFormatError(
                    f"{path}, line {number} is not JSON: the journal is damaged; delete it, or "
                    "this line and all after it"
                ) from error
            if not isinstance(entry, dict):
                raise FileFormatError(f"{path}, line {number} is no entry of a journal")
            lines.append(entry)
        return lines

    def _drop_torn_line(self, path: Path) -> None:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            _log.warning("%s: the last line was not written to its end and is dropped", path)
            os.truncate(path, end)

    def _foreign(self) -> FileFormatError:
        return FileFormatError(
            f"{self.path} is not a search journal that this polarfast reads: name another file"
        )

    def _check(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        old = header.get("settings")
        if header.get("version") != VERSION or not isinstance(old, dict):
            raise self._foreign()
        names = [n for n in {**old, **settings} if old.get(n) != settings.get(n)]
        if names:
            differing = ", ".join(f"{n} ({old.get(n)!r}, now {settings.get(n)!r})" for n in names)
            raise ArgumentError(
                f"journal={str(self.path)!r} is of a search with other settings: {differing}; "
                "name another file, or delete it"
            )
