"""Runs as their folders tell them. An unfinished run has less to tell, and says so."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import polarfast as pf

from ...errors import ArgumentError, FileFormatError
from ...storage import read_tensors
from ..folder import NAMES
from ..histograms import BINS
from ..results import Results, read_results


@dataclass(frozen=True)
class GammaHistory:
    """The scaling factors over the epochs of sparsity training.

    Attributes:
        names: of the layers.
        counts: of γ in 100 equal bins over [0, 1], int32 [epochs, layers, 100].
        last: γ of each layer after the last of these epochs, float32 [C].
    """

    names: list[str]
    counts: Tensor
    last: dict[str, Tensor]


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run.

    Attributes:
        name: the folder's, with as much of the path as tells it from the others.
        recipe: nested settings.
        epochs: one dict of numbers for each finished epoch.
        gammas, plan, results: None while the run has not come so far, or has no use for them.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    epochs: list[dict[str, Any]]
    gammas: GammaHistory | None
    plan: pf.PruningPlan | None
    results: Results | None

    def series(self, key: str) -> list[tuple[int, float]]:
        """(number of the epoch within the run, value) of every epoch that has a value."""
        return [(e["index"], e[key]) for e in self.epochs if e.get(key) is not None]

    @property
    def stages(self) -> list[tuple[str, int]]:
        """Each stage that began, with the number of its first epoch within the run."""
        found: list[tuple[str, int]] = []
        for epoch in self.epochs:
            if not found or found[-1][0] != epoch["stage"]:
                found.append((epoch["stage"], epoch["index"]))
        return found

    @property
    def unfinished(self) -> str | None:
        """How far an unfinished run is, in words; None for a finished one."""
        if self.results is not None:
            return None
        if not self.epochs:
            return "no epoch is done"
        last = self.epochs[-1]
        of = f" of {last['epochs']}" if "epochs" in last else ""
        return f"{last['stage']}, epoch {last['epoch']}{of}"


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read every run, in the order given.

    Raises:
        ArgumentError: no folders, one given twice, or one that is no run.
        FileFormatError, PlanError: a file of a run is damaged.
    """
    if not folders:
        raise ArgumentError("runs: name at least one folder of a run")
    resolved = [Path(folder).resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise ArgumentError(f"runs: '{folders[number]}' is given twice")
    names = _shortest_names(resolved)
    return [_read_run(Path(given), name) for given, name in zip(folders, names, strict=True)]


def _shortest_names(folders: Sequence[Path]) -> list[str]:
    """As few trailing parts of each path as tell it from all others."""
    names = []
    for folder in folders:
        for length in range(1, len(folder.parts) + 1):
            tail = folder.parts[-length:]
            if sum(other.parts[-length:] == tail for other in folders) == 1:
                break
        names.append("/".join(tail))
    return names


def _read_run(folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        raise ArgumentError(f"run '{folder}': there is no such folder")
    files = {name: folder / file for name, file in NAMES.items()}
    if not files["recipe"].is_file():
        raise ArgumentError(
            f"run '{folder}': no folder of a run, {NAMES['recipe']} is missing; name a folder that "
            "'polarfast run RECIPE --out FOLDER' wrote"
        )
    plan, results = files["plan"], files["results"]
    return RunRecord(
        name=name,
        folder=folder,
        recipe=_read_recipe(files["recipe"]),
        epochs=_read_metrics(files["metrics"]),
        gammas=_read_gammas(files["gammas"]),
        plan=pf.PruningPlan.from_json(plan.read_text(encoding="utf-8")) if plan.is_file() else None,
        results=read_results(results) if results.is_file() else None,
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FileFormatError(f"'{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"'{path}' holds no 'key: value' lines")
    return values


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """One dict for each whole line; a run that goes on may be in the middle of writing the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    epochs = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            values = json.loads(line)
            # What every reader below relies on.
            values = {**values, "index": int(values["index"]), "stage": str(values["stage"])}
            epochs.append({**values, "epoch": int(values["epoch"])})
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"'{path}', line {number}: no epoch of a run ({type(error).__name__}: {error})"
            ) from error
    return epochs


def _read_gammas(path: Path) -> GammaHistory | None:
    if not path.is_file():
        return None
    content = read_tensors(path, "delete it to have a report without γ")
    try:
        history = GammaHistory(
            list(content["names"]), content["counts"], dict(content["values_last"])
        )
        shape = tuple(history.counts.shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"'{path}' holds no history of scaling factors ({type(error).__name__}: {error}); "
            "delete it to have a report without γ"
        ) from error
    if len(shape) != 3 or shape[1:] != (len(history.names), BINS):
        raise FileFormatError(
            f"'{path}': counts have shape {list(shape)}, not [epochs, {len(history.names)}, {BINS}]"
            "; delete it to have a report without γ"
        )
    if missing := [name for name in history.names if name not in history.last]:
        raise FileFormatError(f"'{path}': values_last has no γ of {missing[0]}")
    return history if shape[0] and shape[1] else None
