"""A whole run, small: what it leaves in its folder, what it tells, and its stages one by one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.engine import TINY, Watcher, assert_same, go_on, on, outcome

import polarfast as pf
from polarfast.engine import launch as launching
from polarfast.engine import models
from polarfast.engine import stages as loop
from polarfast.engine.distributed import Workers
from polarfast.engine.folder import load_checkpoint
from polarfast.engine.interrupts import Interrupted
from polarfast.engine.launch import find_state, launch, progress
from polarfast.engine.recipe import Pruning, Recipe, Sparsity, Stage
from polarfast.engine.run import Run
from polarfast.errors import ArgumentError, FileFormatError, PlanError


def shown(
    folder: Path, phases: tuple[str, ...] = ("train", "prune", "finetune"), recipe: Recipe = TINY
) -> str:
    """What the command prints."""
    screen = folder.parent / "screen.txt"
    with open(screen, "w", encoding="utf-8") as file:
        launch(recipe, folder, Console(file=file, width=120), phases)
    return screen.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "LATENCY_SECONDS", 0.05)
        shown(folder)
    return folder


@pytest.mark.slow
def test_folder_holds_all_that_was_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("recipe.yaml", "metrics.jsonl", "gammas.pt", "plan.txt", "plan.json", "results.json"),
        *("results.txt", "dense.pt", "pruned.pt", "slim.pt", "tensorboard", "checkpoints"),
        *("gamma_histogram.png", "gamma_over_epochs.png", "channels_kept.png"),
    }
    assert not [name for name in names if name.startswith(".")]
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 1, 2]
    assert "right after pruning" in (finished / "results.txt").read_text(encoding="utf-8")


def test_gammas_by_epoch(finished: Path) -> None:
    content = torch.load(finished / "gammas.pt", weights_only=True)
    dense = torch.load(finished / "dense.pt", weights_only=True)
    assert content["counts"].shape == (3, len(content["names"]), 100)
    for row, (name, gamma) in enumerate(content["values_last"].items()):
        assert content["names"][row] == name and torch.equal(gamma, dense[name])
        expected = torch.histc(gamma, 100, 0.0, 1.0).int()
        assert torch.equal(content["counts"][-1, row], expected)


def test_results_agree_with_the_files(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    plan = pf.PruningPlan.from_json((finished / "plan.json").read_text())
    run = Run(TINY, finished, Workers(TINY.hardware), find_state(finished, TINY))
    dense, slim = run.networks.dense(), run.networks.slim()
    assert results["macs"] == {"dense": plan.macs_before, "slim": plan.macs}
    assert 0 < plan.flops_reduction < 1
    assert results["params"]["dense"] == sum(p.numel() for p in dense.parameters())
    assert results["params"]["slim"] == sum(p.numel() for p in slim.parameters())
    assert results["file_bytes"]["slim"] == (finished / "slim.pt").stat().st_size
    assert results["verified_error"] < 1e-6
    pruned = run.networks.slim("pruned")
    for name, model in {"dense": dense, "finetuned": slim, "pruned": pruned}.items():
        model.eval()
        with torch.no_grad():
            right = [(model(images).argmax(1) == labels) for images, labels in run.data.test(500)]
        accuracy = 100 * float(torch.cat(right).float().mean())
        assert results[f"accuracy_{name}"] == pytest.approx(accuracy)


def test_best_checkpoint_of_each_stage(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for phase, epochs in {"train": lines[:3], "finetune": lines[3:]}.items():
        state = load_checkpoint(finished / "checkpoints" / f"best-{phase}.pt")
        best = max(epochs, key=lambda epoch: epoch["accuracy"])  # the first of equals
        assert state["history"][-1]["index"] == best["index"]
        assert state["trainer"]["step"] == 4 * best["epoch"]


@pytest.mark.slow
def test_stages_one_by_one_are_the_run(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ArgumentError, match="not ready for 'prune': 'train' comes first"):
        shown(folder, ("prune",))
    assert not folder.exists()
    assert "fine-tuning" not in shown(folder, ("train",))
    with pytest.raises(ArgumentError, match="not ready for 'finetune': 'prune' comes first"):
        shown(folder, ("finetune",))
    assert "nothing left of 'train'" in shown(folder, ("train",))
    assert "sparsity training" not in shown(folder, ("prune",))
    assert "fine-tuned" in shown(folder, ("finetune",))
    assert_same(outcome(folder), outcome(finished))


@pytest.mark.slow
def test_finished_run_is_shown_again(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "slim.pt").stat().st_mtime_ns
    output = shown(folder)
    assert "is finished" in output and "fine-tuned" in output and "loss" not in output
    assert (folder / "slim.pt").stat().st_mtime_ns == before
    assert_same(outcome(folder), outcome(finished))


def test_which_state_is_gone_on_from(finished: Path, tmp_path: Path) -> None:
    other = replace(TINY, seed=1)
    assert find_state(tmp_path, TINY) is None and progress(tmp_path) is None
    with pytest.raises(ArgumentError, match="nothing to resume"):
        find_state(tmp_path, TINY, must=True)
    assert find_state(finished, TINY, again=True) is None  # as the demo starts anew
    assert find_state(finished, TINY, must=True, again=True) is not None
    with pytest.raises(ArgumentError, match=r"finished run .* other settings \(seed\)"):
        find_state(finished, other)
    other = replace(TINY, train=replace(TINY.train, lr=0.3), data=replace(TINY.data, shift=2))
    with pytest.raises(ArgumentError, match=r"other settings \(data.shift, train.lr\)"):
        find_state(finished, other)
    computed_otherwise = replace(on(TINY, threads=2, keep=5), accumulate=2)
    assert find_state(finished, computed_otherwise) is not None
    assert progress(finished) == "at its end"


def test_only_damaged_checkpoints(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"not one")
    with pytest.raises(FileFormatError, match="delete it"):
        find_state(folder, TINY)


def test_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for changes in ({"batch_size": 101}, {"accumulate": 5}, {"batch_size": 0}):
        with pytest.raises(ArgumentError, match=next(iter(changes))):
            shown(tmp_path / "run", recipe=replace(TINY, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_observers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SHOW_SECONDS", 0.0)
    watcher = Watcher()
    go_on(TINY, tmp_path, [watcher])
    kinds = [kind for kind, _ in watcher.told]
    epoch = ["step"] * 4 + ["epoch"]
    assert kinds == ["stage", *epoch * 3, "note", "stage", *epoch * 2]
    stages = [content for kind, content in watcher.told if kind == "stage"]
    assert stages == [("sparsity training", 0, 12, 3), ("fine-tuning", 0, 8, 2)]
    steps = [content for kind, content in watcher.told if kind == "step"]
    assert [(step.step, step.epoch) for step in steps] == [
        *((number, (number - 1) // 4 + 1) for number in range(1, 13)),
        *((number, (number - 1) // 4 + 1) for number in range(1, 9)),
    ]
    assert all(step.cut is not None for step in steps[:12])
    assert all(step.cut is None and step.at_zero is None for step in steps[12:])
    epochs = [content for kind, content in watcher.told if kind == "epoch"]
    assert [epoch.index for epoch in epochs] == [1, 2, 3, 4, 5]
    # The last step of an epoch shows its mean loss, and the rate that it was done at.
    for epoch, step in zip(epochs, [s for s in steps if s.step % 4 == 0], strict=True):
        assert (epoch.stage, epoch.epoch) == (step.stage, step.epoch)
        assert epoch.loss == pytest.approx(step.loss) and epoch.lr == step.lr
    plan = pf.PruningPlan.from_json((tmp_path / "plan.json").read_text())
    assert epochs[2].gammas is not None and epochs[3].gammas is None
    assert epochs[2].gammas.cut == pytest.approx(plan.flops_reduction)
    note = next(content for kind, content in watcher.told if kind == "note")
    assert f"{100 * plan.flops_reduction:.1f} % of the MACs" in note


@pytest.mark.slow
def test_steps_are_told_of_a_few_times_a_second(tmp_path: Path) -> None:
    watcher = Watcher()
    go_on(replace(TINY, train=Stage(20, 0.1)), tmp_path, [watcher], until="train")
    seconds = sum(content.seconds for kind, content in watcher.told if kind == "epoch")
    steps = [content for kind, content in watcher.told if kind == "step"]
    # Between two of them at least 0.3 s; accuracy and checkpoints take their time, too.
    assert len(steps) <= 1 + 3 * seconds / loop.SHOW_SECONDS and len(steps) < 80


def test_stages_of_no_epochs(tmp_path: Path) -> None:
    """A trained network that is only pruned: no training before, no fine-tuning after."""
    weights = tmp_path / "weights.pt"
    torch.manual_seed(5)
    model = models.build("resnet8", 10, 1)
    for gamma in pf.scaling_factors(model, torch.zeros(1, 1, 16, 16)).values():
        torch.nn.init.uniform_(gamma, 0.1, 1.0)
        gamma.data[::2] = 0.0
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, weights)
    recipe = replace(
        TINY,
        weights=str(weights),
        sparsity=Sparsity(lam=0.1, init=None),
        train=Stage(0, 0.1),
        finetune=Stage(0, 0.1),
        pruning=Pruning(method="fixed", value=0.01),
    )
    run = go_on(recipe, tmp_path / "run")
    dense = torch.load(tmp_path / "run" / "dense.pt", weights_only=True)
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())
    assert run.facts["accuracy_dense"] == run.facts["accuracy_finetuned"]
    assert run.facts["cut"] > 0.3 and run.history == []
    assert not (tmp_path / "run" / "gammas.pt").exists()


@pytest.mark.parametrize(("init", "told"), [(0.5, True), (None, False)])
def test_learned_scaling_factors_are_not_overwritten_in_silence(
    tmp_path: Path, init: float | None, told: bool
) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(models.build("resnet8", 10, 1).state_dict(), weights)
    sparsity = replace(TINY.sparsity, init=init)
    recipe = replace(TINY, weights=str(weights), sparsity=sparsity, train=Stage(0, 0.1))
    watcher = Watcher()
    go_on(recipe, tmp_path / "run", [watcher], until="train")
    notes = [text for kind, text in watcher.told if kind == "note"]
    assert any("sparsity.init=0.5 overwrites" in text for text in notes) is told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ({"fc.weight": torch.zeros(3)}, "do not fit the model"),
        (torch.zeros(3), "no state dict"),
        ({"epoch": 3}, "no state dict"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "weights.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(ArgumentError, match=f"weights=.*{message}"):
        models.load_weights(models.build("resnet8", 10, 1), str(path))


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(FileFormatError, match=r"weights\.pt"):
        models.load_weights(models.build("resnet8", 10, 1), str(path))


@pytest.mark.slow
def test_killed_between_the_last_epoch_and_its_results(finished: Path, tmp_path: Path) -> None:
    """γ by epoch are written even when all epochs were done before."""
    folder = tmp_path / "run"

    def stop(epoch: object) -> None:
        raise Interrupted(15)

    watcher = Watcher(at_epoch=lambda epoch: stop(epoch) if epoch.epoch == 3 else None)
    with pytest.raises(Interrupted):
        go_on(TINY, folder, [watcher])
    assert progress(folder) == "after step 12 of the phase 'train'"
    go_on(TINY, folder)
    assert_same(outcome(folder), outcome(finished))


def test_new_run_takes_the_place_of_what_was_there(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "mine.txt").write_text("kept")
    with open(tmp_path / "screen.txt", "w", encoding="utf-8") as file:
        launch(TINY, folder, Console(file=file), ("train",), again=True)
    assert "Going on" not in (tmp_path / "screen.txt").read_text(encoding="utf-8")
    assert not (folder / "slim.pt").exists() and not (folder / "results.json").exists()
    assert (folder / "mine.txt").exists()
    assert len(list((folder / "tensorboard").glob("events*"))) == 1


def test_results_that_no_run_here_wrote_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "slim.pt").write_bytes(b"somebody's model")
    with pytest.raises(ArgumentError, match="slim.pt' would be overwritten.*--out"):
        shown(folder)
    assert [path.name for path in folder.iterdir()] == ["slim.pt"]
    assert (folder / "slim.pt").read_bytes() == b"somebody's model"


def test_gammas_shown_are_those_that_would_be_pruned(tmp_path: Path) -> None:
    recipe = replace(TINY, ema=0.9)
    run = Run(recipe, tmp_path / "run", Workers(recipe.hardware))
    run.execute(until="train")
    dense = torch.load(tmp_path / "run" / "dense.pt", weights_only=True)
    last = torch.load(tmp_path / "run" / "gammas.pt", weights_only=True)["values_last"]
    assert all(torch.equal(values, dense[name]) for name, values in last.items())


def test_share_out_of_reach_is_refused_before_training(tmp_path: Path) -> None:
    sparsity = replace(TINY.sparsity, residual="keep")
    recipe = replace(TINY, sparsity=sparsity, pruning=Pruning(method="percentile", cut=0.999))
    watcher = Watcher()
    with pytest.raises(PlanError, match="cut=0.999 of the MACs is out of reach"):
        go_on(recipe, tmp_path / "run", [watcher])
    assert not watcher.told and find_state(tmp_path / "run", recipe) is None
