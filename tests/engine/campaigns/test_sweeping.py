"""sweep: each setting of λ and t is one resumable run; search: each trial is."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import polarfast as pf
from polarfast.engine.campaigns import seeking, sweeping
from polarfast.engine.data.settings import Data
from polarfast.engine.recipe import Hardware, Recipe, Sparsity, Stage
from polarfast.errors import ArgumentError

TINY = Recipe(
    data=Data("digits", train_images=100, test_images=60),
    model="resnet8",
    sparsity=Sparsity(lam=3e-3, t=1.2),
    train=Stage(epochs=4, lr=0.1, schedule="constant"),
    finetune=Stage(epochs=1, lr=0.02),
    batch_size=10,
    hardware=Hardware(device="cpu"),
)


def quiet(text: str) -> None:
    """Tells nobody."""


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    points = sweeping.sweep(TINY, [3e-3, 3e-2], [0.0], 1, tmp_path, 2, quiet)
    assert [(point.lam, point.t) for point in points] == [(3e-3, 1.2), (3e-2, 1.2), (3e-3, 0.0)]
    for point in points:
        folder = tmp_path / f"lam{point.lam:g}-t{point.t:g}-seed0"
        plan = pf.PruningPlan.from_json((folder / "plan.json").read_text())
        assert point.cuts == pytest.approx((plan.flops_reduction,))
        assert f"lam: {point.lam}" in (folder / "recipe.yaml").read_text()
    assert points[1].cuts > points[0].cuts, "ten times λ must cut more"
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written[1]["finetuned"] == list(points[1].finetuned)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, record=True)
    console.print(sweeping.table(points, "title"))
    assert f"{points[1].finetuned[0]:.2f}" in console.export_text()

    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/log.txt")}
    assert sweeping.sweep(TINY, [3e-3, 3e-2], [0.0], 1, tmp_path, 1, quiet) == points
    assert logs == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/log.txt")}


def test_sweep_refuses_what_it_cannot_vary(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="lams, ts"):
        sweeping.sweep(TINY, [], [], 1, tmp_path, 1, quiet)
    steered = dataclasses.replace(TINY.sparsity, regularizer="flops-target", cut=0.5)
    with pytest.raises(ArgumentError, match="regularizer"):
        sweeping.sweep(
            dataclasses.replace(TINY, sparsity=steered), [1e-3], [], 1, tmp_path, 1, quiet
        )
    assert not list(tmp_path.iterdir())


SETTINGS = {
    "tol": 0.3,
    "max_trials": 4,
    "lam_high": 2e-2,
    "stability": pf.Stability(window=1, least=1, patience=4),
}


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("warm_epochs", [0, 1])
def test_search_goes_on_where_it_was_stopped(tmp_path: Path, warm_epochs: int) -> None:
    whole: list[str] = []
    found = seeking.seek(TINY, 0.4, tmp_path / "whole", whole.append, warm_epochs, **SETTINGS)
    assert abs(found.cut - 0.4) < 0.6
    trials = [line for line in whole if line.startswith("λ=")]
    assert len(trials) == sum(trial.epochs for trial in found.trials)

    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) == len(whole) - 1:  # in the middle of the last trial
            raise Stop

    with pytest.raises(Stop):
        seeking.seek(TINY, 0.4, tmp_path / "parts", stop, warm_epochs, **SETTINGS)
    rest: list[str] = []
    again = seeking.seek(TINY, 0.4, tmp_path / "parts", rest.append, warm_epochs, **SETTINGS)
    assert again == found
    last = found.trials[-1]
    assert rest == whole[-last.epochs :], "finished trials and the warm start are not run again"
    console = Console(width=100, record=True)
    console.print(seeking.table(found, 0.4))
    assert f"{100 * last.cut:.1f}" in console.export_text()


@pytest.mark.slow
def test_trials_of_another_recipe_do_not_count(tmp_path: Path) -> None:
    seeking.seek(TINY, 0.4, tmp_path, quiet, **SETTINGS)
    other = dataclasses.replace(TINY, seed=7, batch_size=20)
    with pytest.raises(ArgumentError, match=r"other settings \(batch_size, seed\)"):
        seeking.seek(other, 0.4, tmp_path, quiet, **SETTINGS)
    # Where λ stood in the recipe is no matter: the search chooses its own.
    same = dataclasses.replace(TINY, sparsity=dataclasses.replace(TINY.sparsity, lam=1.0))
    seeking.seek(same, 0.4, tmp_path, quiet, **SETTINGS)


def test_gated_trials_start_warm(tmp_path: Path) -> None:
    sparsity = dataclasses.replace(
        TINY.sparsity, gates="bn", regularize="gate", clamp="all", init=None
    )
    gated = dataclasses.replace(
        TINY, sparsity=sparsity, train=dataclasses.replace(TINY.train, epochs=2)
    )
    found = seeking.seek(gated, 0.4, tmp_path, quiet, 1, **{**SETTINGS, "tol": 0.49})
    assert found.trials and not any(
        name.endswith(".gate") for name in torch.load(tmp_path / "warm-start" / "dense.pt")
    )


def test_search_refuses_other_methods(tmp_path: Path) -> None:
    l1 = dataclasses.replace(TINY, sparsity=Sparsity(lam=1e-3, regularizer="l1"))
    with pytest.raises(ArgumentError, match="polarization"):
        seeking.seek(l1, 0.4, tmp_path, quiet)
