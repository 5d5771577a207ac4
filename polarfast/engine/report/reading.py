"""Runs as their folders tell them. An unfinished run has less to tell, and says so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import polarfast as pf

from ...archives import read_tensors
from ...documents import (
    DIGEST,
    brief,
    check_fields,
    list_of,
    mapping_of,
    optional,
    parse_json,
    real,
    short,
    text,
    unsealed,
    whole,
)
from ...errors import ArgumentError, FileFormatError, PlanError
from ...storage import read_text
from ..folder import NAMES, read_plan
from ..histograms import BINS
from ..results import Results, read_results
from ..yamls import MOST_BYTES, is_sealed, parse_yaml

Content = TypeVar("Content")
ADVICE = "the rest of the run is shown without it"
_COUNT = whole(1, 10**9)
_NUMBERS = (
    *("epochs", "loss", "accuracy", "lr", "seconds", "images_per_second", "computed"),
    *("cut", "at_zero", "lam", "t", DIGEST),
)
_EPOCH = {
    **dict.fromkeys(_NUMBERS, optional(real(-1e30, 1e30))),
    "epochs": _COUNT,
    "stage": text,
    "epoch": _COUNT,
    "index": _COUNT,
    DIGEST: text,
}
_GAMMAS = {
    "names": list_of(text),
    "counts": lambda value: isinstance(value, Tensor),
    "values_last": mapping_of(lambda value: isinstance(value, Tensor)),
}


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
        gammas, plan, results: None while the run has not come so far, has no use for them, or they
            cannot be read.
        ended: whether the run has written its results.
        unread: what cannot be read, a sentence each.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    epochs: list[dict[str, Any]]
    gammas: GammaHistory | None
    plan: pf.PruningPlan | None
    results: Results | None
    ended: bool = False
    unread: list[str] = field(default_factory=list)

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
        if self.ended:
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
    if not files["recipe"].exists():
        raise ArgumentError(
            f"run '{folder}': no folder of a run, {NAMES['recipe']} is missing; name a folder that "
            "'polarfast run RECIPE --out FOLDER' wrote"
        )
    unread: list[str] = []

    def read(kind: str, reader: Callable[[Path, list[str]], Content]) -> Content | None:
        try:
            return reader(files[kind], unread)
        except FileNotFoundError:
            return None
        except (FileFormatError, PlanError) as error:
            unread.append(brief(error))
            return None

    recipe, epochs = read("recipe", _read_recipe), read("metrics", _read_metrics)
    plan = read("plan", lambda path, _: read_plan(path))
    gammas = read("gammas", lambda path, _: _read_gammas(path, plan))
    results = read("results", lambda path, _: read_results(path))
    if results is not None and len(epochs or []) < results.epochs.dense:
        unread.append(
            f"'{files['metrics']}' has {len(epochs or [])} of {results.epochs.dense:.0f} epochs"
        )
    return RunRecord(
        name=name,
        folder=folder,
        recipe=recipe or {},
        epochs=epochs or [],
        gammas=gammas,
        plan=plan,
        results=results,
        ended=results is not None or files["results"].exists(),
        unread=unread,
    )


def _read_recipe(path: Path, unread: list[str]) -> dict[str, Any]:
    text = read_text(path, ADVICE, MOST_BYTES)
    try:
        sealed = is_sealed(text)
        values, _ = parse_yaml(text)
    except ValueError as error:
        raise FileFormatError(f"'{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"'{path}' holds no 'key: value' lines")
    if not sealed:
        unread.append(f"'{path}' does not end in its digest: it is older, or was cut short")
    return values


def _read_metrics(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """One dict for each whole line; a run that goes on may be in the middle of writing the last."""
    lines = read_text(path, ADVICE).split("\n")[:-1]
    epochs: list[dict[str, Any]] = []
    wrong = 0
    for number, line in enumerate(lines, start=1):
        try:
            values = unsealed(check_fields(parse_json(line), _EPOCH, "the epoch", _NUMBERS))
            if not (epochs[-1]["index"] if epochs else 0) < values["index"] <= len(lines):
                raise ValueError("the epochs are not in order")
            epochs.append({name: _rounded(value) for name, value in values.items()})
        except ValueError as error:
            wrong += 1
            if wrong == 1:
                unread.append(f"'{path}', line {number}: no epoch of a run ({brief(error)})")
    if wrong > 1:
        unread.append(f"'{path}': {wrong} of {len(lines)} lines cannot be read")
    return epochs


def _rounded(value: Any) -> Any:
    """Values too small for a scale are 0."""
    return 0.0 if isinstance(value, float) and abs(value) < 1e-30 else value


def _read_gammas(path: Path, plan: pf.PruningPlan | None) -> GammaHistory | None:
    content = read_tensors(path, "delete it to have a report without γ")
    try:
        check_fields(content, _GAMMAS, "the history of scaling factors")
        history = GammaHistory(content["names"], content["counts"], content["values_last"])
        _check_gammas(history)
        if plan is not None:
            _check_same_run(history, plan)
    except ValueError as error:
        raise FileFormatError(
            f"'{path}' holds no history of scaling factors of this run ({error}); delete it to have"
            " a report without γ"
        ) from error
    return history if all(history.counts.shape[:2]) else None


def _check_gammas(history: GammaHistory) -> None:
    shape = tuple(history.counts.shape)
    if len(shape) != 3 or shape[1:] != (len(history.names), BINS):
        raise ValueError(
            f"counts have shape {list(shape)}, not [epochs, {len(history.names)}, {BINS}]"
        )
    if history.counts.dtype != torch.int32 or bool((history.counts.sum((1, 2)) <= 0).any()):
        raise ValueError("counts are no counts of γ")
    for name in history.names:
        values = history.last.get(name)
        if values is None:
            raise ValueError(f"values_last has no γ of {short(name)}")
        if values.dim() != 1 or not values.numel() or not values.is_floating_point():
            raise ValueError(f"values_last of {short(name)} is no vector of γ")
        if not bool(values.isfinite().all()):
            raise ValueError(f"values_last of {short(name)} has γ that are NaN or infinite")


def _check_same_run(history: GammaHistory, plan: pf.PruningPlan) -> None:
    for name in history.names:
        layer = plan.layers.get(name)
        if layer is None or layer.channels != history.last[name].numel():
            raise ValueError(
                f"plan.json does not fit {NAMES['gammas']} at {short(name)}; they are of different "
                "runs, delete the older one"
            )
