"""compare: rivals differ from polarization in nothing but the method; runs are shared and kept."""

import dataclasses
import statistics

import pytest
import torch
from rich.console import Console

import polarfast as pf
from polarfast.engine.campaigns import comparison
from polarfast.engine.campaigns.comparison import chains
from polarfast.engine.campaigns.rivals import DENSE, METHODS, method_recipe
from polarfast.engine.campaigns.trials import Trial, done, run_all
from polarfast.engine.data.settings import Data
from polarfast.engine.distributed import Workers
from polarfast.engine.launch import find_state
from polarfast.engine.recipe import Hardware, Recipe, Sparsity, Stage
from polarfast.engine.run import Run
from polarfast.errors import ArgumentError, PolarfastError

TINY = Recipe(
    data=Data("digits", train_images=100, test_images=60),
    model="resnet8",
    sparsity=Sparsity(lam=1e-2),
    train=Stage(epochs=1, lr=0.05),
    finetune=Stage(epochs=1, lr=0.02),
    batch_size=25,
    hardware=Hardware(device="cpu"),
)


@pytest.mark.parametrize("method", [*METHODS, DENSE])
def test_a_rival_gets_the_same_schedule_and_data(method: str) -> None:
    changed = method_recipe(TINY, method, 0.6).to_dict()
    original = TINY.to_dict()
    del changed["sparsity"], changed["pruning"], original["sparsity"], original["pruning"]
    assert changed == original


def test_unknown_methods_are_named() -> None:
    with pytest.raises(ArgumentError, match="'magic'.*network-slimming"):
        method_recipe(TINY, "magic", 0.5)
    with pytest.raises(ArgumentError, match="'magic'"):
        chains(TINY, ["random"], [0.5], 1, {"magic": 1.0})


@pytest.mark.parametrize(
    ("methods", "cuts", "message"),
    [
        (["random", "random"], [0.5], "methods: random, random: one of them is given twice"),
        (["random"], [0.5, 0.5], "cuts: 0.5, 0.5: one of them is given twice"),
        (["random", DENSE], [0.5], "'dense' is compared"),
    ],
)
def test_nothing_counts_twice(methods: list[str], cuts: list[float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        chains(TINY, methods, cuts, 1, {})


def test_rivals_of_a_steered_recipe_aim_at_no_share() -> None:
    sparsity = dataclasses.replace(TINY.sparsity, regularizer="flops-target", cut=0.3)
    steered = dataclasses.replace(TINY, sparsity=sparsity)
    cuts = {method: method_recipe(steered, method, 0.6).sparsity.cut for method in METHODS}
    assert cuts == dict.fromkeys(METHODS) | {"polarization": 0.6}


def test_runs_that_could_never_begin(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    chain = [Trial("one", TINY)]
    with pytest.raises(ArgumentError, match="jobs=0"):
        run_all([chain], tmp_path, 0, print)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="without torchrun"):
        run_all([chain], tmp_path, 1, print)
    assert not list(tmp_path.iterdir())


def test_training_is_shared_only_within_a_chain_and_only_where_it_is_the_same() -> None:
    found = chains(TINY, list(METHODS), [0.5, 0.7], 2, {"deephoyer": 3e-3})
    names = [trial.name for chain in found for trial in chain]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * len(METHODS))
    assert any(trial.trained is not None for chain in found for trial in chain)
    for chain in found:
        seen: dict[str, Trial] = {}
        for trial in chain:
            if trial.trained is not None:
                ours, theirs = trial.recipe, seen[trial.trained].recipe
                assert ours.sparsity == theirs.sparsity
                assert dataclasses.replace(ours, pruning=theirs.pruning) == theirs
            seen[trial.name] = trial
    strengths = {t.recipe.sparsity.lam for c in found for t in c if t.name.startswith("deephoyer")}
    assert strengths == {3e-3}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("compare")
    notes: list[str] = []
    methods = ["network-slimming", "uniform", "random"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "LATENCY_SECONDS", 0.2)
        rows = comparison.compare(TINY, methods, [0.4, 0.6], 1, {}, folder, 2, notes.append)
    return folder, rows, notes


@pytest.mark.slow
def test_every_run_cuts_the_share_that_was_asked(compared) -> None:  # type: ignore[no-untyped-def]
    _, rows, _ = compared
    assert [(row.method, row.asked) for row in rows] == [
        (DENSE, None),
        ("network-slimming", 0.4),
        ("uniform", 0.4),
        ("random", 0.4),
        ("network-slimming", 0.6),
        ("uniform", 0.6),
        ("random", 0.6),
    ]
    for row in rows[1:]:
        # Not less, and hardly more: one channel of 400 is a small share.
        assert row.asked <= row.outcomes[0].cut < row.asked + 0.02
    assert rows[0].outcomes[0].cut == 0


@pytest.mark.slow
def test_accuracies_are_those_of_the_saved_networks(compared) -> None:  # type: ignore[no-untyped-def]
    folder, rows, _ = compared
    by_name = {f"{r.method}-{100 * (r.asked or 0):g}-seed0": r for r in rows[1:]}
    for chain in chains(TINY, ["network-slimming", "uniform", "random"], [0.4, 0.6], 1, {}):
        for trial in chain:
            if trial.name not in by_name:
                continue
            state = find_state(folder / trial.name, trial.recipe)
            run = Run(trial.recipe, folder / trial.name, Workers(TINY.hardware), state)
            images, labels = map(torch.cat, zip(*run.data.test(60), strict=True))
            model = run.networks.slim().eval()
            right = int((model(images).argmax(1) == labels).sum())
            assert by_name[trial.name].outcomes[0].accuracy == pytest.approx(100 * right / 60)


@pytest.mark.slow
def test_uniform_and_random_take_the_same_share_of_every_layer(compared) -> None:  # type: ignore[no-untyped-def]
    folder, _, _ = compared
    for method in ("uniform", "random"):
        plan = pf.PruningPlan.from_json((folder / f"{method}-60-seed0" / "plan.json").read_text())
        shares = [len(kept) / plan.layers[name].channels for name, kept in plan.kept.items()]
        assert max(shares) - min(shares) <= 1 / 16


@pytest.mark.slow
def test_shared_training_is_one_training(compared) -> None:  # type: ignore[no-untyped-def]
    folder, _, _ = compared
    for method, first in (("network-slimming-60", "network-slimming-40"), ("random-60", "dense")):
        one = torch.load(folder / f"{method}-seed0" / "dense.pt", weights_only=True)
        other = torch.load(folder / f"{first}-seed0" / "dense.pt", weights_only=True)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_finished_runs_are_not_run_again(compared) -> None:  # type: ignore[no-untyped-def]
    folder, _, _ = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/log.txt")}
    notes: list[str] = []
    run_all(
        chains(TINY, ["network-slimming", "uniform", "random"], [0.4, 0.6], 1, {}),
        folder,
        1,
        notes.append,
    )
    assert notes == ["7 of 7 runs are finished"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/log.txt")}
    other = dataclasses.replace(TINY, weight_decay=0.1)
    with pytest.raises(ArgumentError, match="weight_decay"):
        done(folder, chains(other, ["random"], [0.4], 1, {})[0][0])


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log(tmp_path) -> None:  # type: ignore[no-untyped-def]
    broken = dataclasses.replace(TINY, data=Data("cifar10", root=str(tmp_path / "nowhere")))
    with pytest.raises(PolarfastError, match="run 'x' failed.*nowhere.*log.txt"):
        run_all([[Trial("x", broken)]], tmp_path, 1, lambda text: None)


@pytest.mark.slow
def test_table_and_plot(compared, tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, rows, _ = compared
    outcomes = [
        dataclasses.replace(rows[1].outcomes[0], seed=seed, accuracy=value)
        for seed, value in enumerate((90.0, 94.0, 95.0))
    ]
    dense = [dataclasses.replace(rows[0].outcomes[0], seed=s, accuracy=96.0) for s in range(3)]
    three = [
        comparison.Row(DENSE, None, tuple(dense)),
        comparison.Row("network-slimming", 0.4, tuple(outcomes)),
    ]
    spread = statistics.stdev((90.0, 94.0, 95.0))
    assert f"| 93.00 ± {spread:.2f} | -3.00 ± {spread:.2f} |" in comparison.markdown(
        three, "title", "caption"
    )
    caption = comparison.caption(TINY, 1, {"deephoyer": 3e-3})
    assert "1 + 1 epochs" in caption and "0.003 for deephoyer" in caption
    console = Console(width=140, record=True)
    console.print(comparison.table(rows, "title", caption))
    text = console.export_text()
    assert all(METHODS[row.method] in text for row in rows[1:])
    comparison.plot(rows, tmp_path / "compare.png", "title")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
