"""The folder of a run: the files in it by name, its checkpoints, and its small text files."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polarfast as pf

from ..archives import read_tensors, write_tensors
from ..errors import ArgumentError, FileFormatError, PlanError
from ..storage import read_text, remove_partial, write_atomically

_log = logging.getLogger(__name__)

FORMAT = 2  # of checkpoints
FOLDER = "checkpoints"
NAMES = {
    "recipe": "recipe.yaml",
    "metrics": "metrics.jsonl",
    "gammas": "gammas.pt",
    "plan": "plan.json",
    "plan_table": "plan.txt",
    "dense": "dense.pt",
    "trained": "trained.pt",  # the run's state right after training
    "pruned": "pruned.pt",
    "slim": "slim.pt",
    "results": "results.json",
    "results_table": "results.txt",
    "tensorboard": "tensorboard",
}


class Artifacts:
    """Paths, and whole-or-not-there writing, of what a run leaves in its folder.

    Args:
        folder: of the run; :meth:`prepare` makes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder, and remove what writes that were killed left in it.

        Raises:
            ArgumentError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"'{self.folder}' cannot be the folder of a run ({error.strerror}): name another "
                "one with --out"
            ) from error
        for name in NAMES.values():
            remove_partial(self.folder, name)

    def path(self, name: str) -> Path:
        """Where the file called ``name`` in ``NAMES`` is."""
        return self.folder / NAMES[name]

    def write(self, name: str, content: Any) -> None:
        """Tensors, numbers and strings."""
        save_tensors(self.path(name), content)

    def read(self, name: str, device: torch.device) -> Any:
        """What :meth:`write` wrote.

        Raises:
            ArgumentError: an earlier stage has not written it yet.
            FileFormatError: it is damaged.
        """
        path = self._existing(name)
        advice = "delete the run's folder and run it again"
        content = read_tensors(path, advice)
        if not isinstance(content, dict) or not all(
            isinstance(value, Tensor) for value in content.values()
        ):
            raise FileFormatError(f"'{path}' holds no weights; {advice}")
        return {key: value.to(device) for key, value in content.items()}

    def write_slim(self, name: str, model: nn.Module, plan: pf.PruningPlan) -> None:
        """A slim model, as ``pf.load`` reads it."""
        write_atomically(self.path(name), lambda file: pf.save(model, plan, file))

    def write_plan(self, plan: pf.PruningPlan) -> None:
        """Which channels stay, for programs and for people."""
        write_text(self.path("plan_table"), f"{plan}\n")
        write_text(self.path("plan"), plan.to_json())

    def plan(self) -> pf.PruningPlan:
        """Which channels stay."""
        return read_plan(self._existing("plan"))

    def write_gammas(self, counts: list[Tensor], last: Mapping[str, Tensor]) -> None:
        """How γ moved.

        Args:
            counts: int32 [L, 100] of each epoch. last: γ of each layer after the last epoch.
        """
        content = {
            "names": list(last),
            "counts": torch.stack(counts),
            "values_last": dict(last),
        }
        self.write("gammas", content)

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for file in self.path("tensorboard").glob("events.out.tfevents.*"):
            file.unlink()
        for name in NAMES:
            if name != "tensorboard":
                self.path(name).unlink(missing_ok=True)

    def _existing(self, name: str) -> Path:
        path = self.path(name)
        if not path.is_file():
            raise ArgumentError(f"'{path}' is not there: run the stages before this one first")
        return path


def read_plan(path: Path) -> pf.PruningPlan:
    """The plan in a file of its own.

    Raises:
        FileFormatError, PlanError: it is damaged, which the message names it for.
        FileNotFoundError: there is none.
    """
    try:
        return pf.PruningPlan.from_json(read_text(path, "prune again"))
    except PlanError as error:
        raise PlanError(f"'{path}': {error}") from error


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` for text."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors, numbers and strings, readable with ``torch.load(weights_only=True)``."""
    write_tensors(path, content)


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
