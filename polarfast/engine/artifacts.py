"""The files that a run leaves in its folder, by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.checkpoint import save_tensors, write_text
from polarfast.errors import ArgumentError
from polarfast.storage import read_tensors, remove_partial, write_atomically

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
        content = read_tensors(path, "delete the run's folder and run it again")
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
        return pf.PruningPlan.from_json(self._existing("plan").read_text(encoding="utf-8"))

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
