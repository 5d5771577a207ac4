"""A bit that flips, or an end that is lost, is found or has no effect, in every kind of file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import flips, found_or_harmless, truncations
from support.nets import Residual, X, prepared
from support.report_runs import RESULTS, gammas, metrics, plan, widths

import polarfast as pf
from polarfast.archives import read_tensors, write_tensors
from polarfast.documents import sealed
from polarfast.engine.folder import load_checkpoint, read_plan, save_tensors
from polarfast.engine.recipe import load_recipe, to_yaml
from polarfast.engine.report.reading import read_runs
from polarfast.engine.results import read_results
from polarfast.engine.watching import JsonLog
from polarfast.engine.yamls import sealed_yaml

pytestmark = pytest.mark.faults
Kind = tuple[Path, Callable[[Path], Any]]


def _slim(folder: Path) -> Path:
    model, scales = prepared(Residual, "expand")
    made = pf.plan(model, X, scales)
    pf.save(pf.slim(model, made), made, folder / "slim.pt")
    return folder / "slim.pt"


def slim_file(folder: Path) -> Kind:
    def read(path: Path) -> Any:
        loaded = pf.load(path, lambda: Residual().double().eval())
        return {**loaded.state_dict(), "info": loaded.polarfast_info.to_json()}

    return _slim(folder), read


def plan_in_a_slim_file(folder: Path) -> Kind:
    return _slim(folder), lambda path: pf.load_plan(path).to_json()


def plan_file(folder: Path) -> Kind:
    model, scales = prepared(Residual, "expand")
    path = folder / "plan.json"
    path.write_text(pf.plan(model, X, scales, cut=0.2).to_json(), encoding="utf-8")
    return path, lambda path: read_plan(path).to_json()


def checkpoint(folder: Path) -> Kind:
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters())
    model(X.float()).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    content = {"format": 2, "phase": "train", "trainer": state, "gammas": [torch.ones(3)]}
    save_tensors(folder / "00000001.pt", {**content, "history": [{"loss": 0.5, "stage": "γ"}]})
    return folder / "00000001.pt", load_checkpoint


def weights(folder: Path) -> Kind:
    torch.save(Residual().state_dict(), folder / "dense.pt")  # as users do
    return folder / "dense.pt", lambda path: dict(read_tensors(path, "take a copy"))


def _run(folder: Path) -> Path:
    names = widths(3)
    lines = metrics(3, 2, 5)
    (folder / "recipe.yaml").write_text(sealed_yaml(to_yaml(load_recipe("demo"))), "utf-8")
    log = JsonLog(folder / "metrics.jsonl", lines)
    log.close()
    write_tensors(folder / "gammas.pt", gammas(names, 3))
    (folder / "plan.json").write_text(plan(names).to_json(), encoding="utf-8")

    values = RESULTS.to_dict() | {"epochs": {"dense": 5.0, "slim": 4.0}}
    (folder / "results.json").write_text(json.dumps(sealed(values), indent=2) + "\n", "utf-8")
    return folder


def of_a_run(name: str) -> Callable[[Path], Kind]:
    def kind(folder: Path) -> Kind:
        def read(path: Path) -> Any:
            (run,) = read_runs([path.parent])
            return {
                "recipe": run.recipe,
                "epochs": run.epochs,
                "gammas": run.gammas and [run.gammas.names, run.gammas.counts, run.gammas.last],
                "plan": run.plan and run.plan.to_json(),
                "results": run.results and run.results.to_dict(),
                "unread": run.unread,
            }

        return _run(folder) / name, read

    return kind


def results(folder: Path) -> Kind:
    return _run(folder) / "results.json", lambda path: read_results(path).to_dict()


def journal(folder: Path) -> Kind:
    path = folder / "search.jsonl"

    def read(path: Path) -> Any:
        copy = path.with_suffix(".copy")  # a search goes on, and writes
        shutil.copyfile(path, copy)
        try:
            found = pf.search(lambda lam, t: iter([min(1.0, lam * 2e3)]), cut=0.4, journal=copy)
        except pf.PolarfastError as error:
            raise type(error)(str(error).replace(".copy", ".jsonl")) from error
        return [(trial.lam, trial.t, trial.cut, trial.epochs) for trial in found.trials]

    pf.search(lambda lam, t: iter([min(1.0, lam * 2e3)]), cut=0.4, journal=path)
    return path, read


KINDS: dict[str, Callable[[Path], Kind]] = {
    **{kind.__name__: kind for kind in (slim_file, plan_in_a_slim_file, plan_file, checkpoint)},
    **{kind.__name__: kind for kind in (weights, results, journal)},
    **{
        f"{name} in a report": of_a_run(name)
        for name in ("recipe.yaml", "metrics.jsonl", "gammas.pt", "plan.json", "results.json")
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_flips(tmp_path: Path, kind: str, tries: int, told: Callable[[str], None]) -> None:
    path, read = KINDS[kind](tmp_path)
    outcomes = found_or_harmless(path, read, flips(path.read_bytes(), tries))
    told(f"{kind}: {tries} flips: {dict(outcomes)}")


@pytest.mark.parametrize("kind", KINDS)
def test_truncations(tmp_path: Path, kind: str, tries: int, told: Callable[[str], None]) -> None:
    path, read = KINDS[kind](tmp_path)
    outcomes = found_or_harmless(path, read, truncations(path.read_bytes(), tries))
    told(f"{kind}: {tries} truncations: {dict(outcomes)}")
