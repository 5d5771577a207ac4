"""A whole run, small; interrupted at every stage; what it leaves in its folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import polarfast as pf
from polarfast.engine import demo as engine_demo
from polarfast.engine.checkpoint import save_checkpoint
from polarfast.engine.events import Epoch
from polarfast.engine.recipe import Recipe, Sparsity, Stage
from polarfast.engine.results import Results
from polarfast.engine.run import Run, find_checkpoint, progress
from polarfast.errors import ArgumentError

CPU = torch.device("cpu")
RECIPE = Recipe(
    data="digits",
    model="resnet8",
    sparsity=Sparsity(lam=2e-2, t=1.2),
    train=Stage(epochs=3, lr=0.1, warmup=0.1),
    finetune=Stage(epochs=2, lr=0.02),
    batch_size=100,
    shift=1,
)


class Interrupter:
    """Ctrl-C right after a given epoch of the run."""

    def __init__(self, index: int) -> None:
        self.index = index

    def stage_started(self, stage: str, done: int, epochs: int) -> None:
        pass

    def epoch_finished(self, epoch: Epoch) -> None:
        if epoch.index == self.index:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def run_demo(folder: Path, resume: bool = False, recipe: Recipe = RECIPE) -> Results:
    with open(folder.parent / "screen.txt", "w") as screen:
        return engine_demo.demo(recipe, folder, CPU, resume, Console(file=screen, width=100))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    engine_demo.LATENCY_SECONDS = 0.05
    run_demo(folder)
    return folder


def test_folder_holds_all_that_was_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("slim.pt", "plan.txt", "plan.json", "results.json", "results.txt", "metrics.jsonl"),
        *("gamma_histogram.png", "gamma_over_epochs.png", "channels_kept.png", "tensorboard"),
    }
    assert not [name for name in names if name.startswith(".")]
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 1, 2]


def test_results_agree_with_the_files(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    plan = pf.PruningPlan.from_json((finished / "plan.json").read_text())
    run = Run(RECIPE, finished, CPU, find_checkpoint(finished, RECIPE, must=True))
    dense, slim = run.dense(), run.slim()
    assert results["macs"] == {"dense": plan.macs_before, "slim": plan.macs}
    assert results["params"]["dense"] == sum(p.numel() for p in dense.parameters())
    assert results["params"]["slim"] == sum(p.numel() for p in slim.parameters())
    assert results["file_bytes"]["slim"] == (finished / "slim.pt").stat().st_size
    assert results["verified_error"] < 1e-6
    for name, model in {"dense": dense, "finetuned": slim, "pruned": run.slim("pruned.pt")}.items():
        with torch.no_grad():
            right = model.eval()(run.data.test.images).argmax(1) == run.data.test.labels
        assert results[f"accuracy_{name}"] == pytest.approx(100 * float(right.float().mean()))
    assert "right after pruning" in (finished / "results.txt").read_text()


def test_pruning_removed_something(finished: Path) -> None:
    plan = pf.PruningPlan.from_json((finished / "plan.json").read_text())
    assert 0 < plan.flops_reduction < 1


def write_unfinished(folder: Path) -> None:
    folder.mkdir()
    state = {"recipe": RECIPE.to_dict(), "stage": "sparsity training", "trainer": None}
    save_checkpoint(folder / "checkpoint.pt", state)


@pytest.mark.parametrize("index", [1, 3, 4, 5])
def test_interrupted_run_ends_as_the_whole_one(
    finished: Path, tmp_path: Path, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run = Run(RECIPE, folder, CPU)
    run.observers = [Interrupter(index)]
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    done = progress(folder)
    assert done is not None and done.startswith("after epoch")

    monkeypatch.setattr(engine_demo, "LATENCY_SECONDS", 0.05)
    run_demo(folder, resume=True)
    for name in ("dense.pt", "slim.pt"):
        whole, resumed = (
            torch.load(f / name, weights_only=True) if name == "dense.pt" else f / name
            for f in (finished, folder)
        )
        if isinstance(whole, Path):
            build = Run(RECIPE, folder, CPU).build
            whole, resumed = (pf.load(p, build=build).state_dict() for p in (whole, resumed))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    log = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in log] == [1, 2, 3, 4, 5]


def test_which_checkpoint_is_gone_on_from(finished: Path, tmp_path: Path) -> None:
    other = replace(RECIPE, seed=1)
    assert find_checkpoint(tmp_path, RECIPE) is None
    assert find_checkpoint(finished, RECIPE) is None  # finished: a new run starts
    assert find_checkpoint(finished, RECIPE, must=True) is not None
    assert find_checkpoint(finished, other) is None
    with pytest.raises(ArgumentError, match=r"finished run .* other settings \(seed\)"):
        find_checkpoint(finished, other, must=True)
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "results.json").unlink()  # as when stopped while latency is measured
    assert find_checkpoint(copy, RECIPE) is not None
    write_unfinished(tmp_path / "half")
    assert find_checkpoint(tmp_path / "half", RECIPE) is not None
    other = replace(RECIPE, train=replace(RECIPE.train, lr=0.3))
    with pytest.raises(ArgumentError, match=r"unfinished run .* other settings \(train.lr\)"):
        find_checkpoint(tmp_path / "half", other)
    with pytest.raises(ArgumentError, match="nothing to resume"):
        find_checkpoint(tmp_path, RECIPE, must=True)
    assert progress(tmp_path) is None


def test_epochs_are_told_in_order(tmp_path: Path) -> None:
    class Recorder(Interrupter):
        epochs: list[Epoch] = []

        def epoch_finished(self, epoch: Epoch) -> None:
            self.epochs.append(epoch)

    recorder = Recorder(-1)
    run = Run(replace(RECIPE, train=Stage(1, 0.1), finetune=Stage(1, 0.1)), tmp_path / "r", CPU)
    run.observers = [recorder]
    run.execute()
    first, second = recorder.epochs
    assert first.gammas is not None and second.gammas is None
    assert (first.stage, second.stage) == ("sparsity training", "fine-tuning")
    assert 0 <= first.gammas.cut <= 1
