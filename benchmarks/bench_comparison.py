"""Polarization and its rivals on a subset of CIFAR-10: strengths chosen on held-out images, tables
on fresh seeds and all 10,000 test images.

ResNet-20 and a VGG-11 of half the width, 5,000 training images, 12 + 6 epochs, 50 and 70 % of the
MACs; bfloat16 and channels_last, for every method alike.

    python benchmarks/bench_comparison.py tune  --root CIFAR10_AS_A_FOLDER
    python benchmarks/bench_comparison.py final --root CIFAR10_AS_A_FOLDER [--seeds 1 2 3]
    python benchmarks/bench_comparison.py rates --root CIFAR10_AS_A_FOLDER
    python benchmarks/bench_comparison.py reference --root CIFAR10_AS_A_FOLDER [--seeds 1 2 3]
    python benchmarks/bench_comparison.py table [--figure FILE.png]

"tune" gives each rival that has something to choose four tries, one seed, and compares their
fine-tuned accuracy on 5,000 training images that are held out; and polarization with three ways to
compare γ of different layers, of which the one that ships is "mean". "final" takes the rivals'
best ones, polarization as it ships, and seeds that "tune" did not see. Finished runs are lines of
results/comparison.jsonl and are not run again, so that all of it (10 hours on one core) can be done
in parts. "table" prints what there is.

"rates" fine-tunes at four learning rates, on the held-out images. "reference" is one setting in
which the authors' own program was run: 1,000 training and 300 test images of each class, the first
of each by name, ResNet-20, 20 + 6 epochs.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import polarfast as pf
from polarfast.engine.campaigns.comparison import STYLES, chains, spread
from polarfast.engine.campaigns.rivals import DENSE, METHODS
from polarfast.engine.campaigns.trials import Trial, adopt_training
from polarfast.engine.data.source import DataSource, load
from polarfast.engine.distributed import Workers
from polarfast.engine.figures import save, subplots
from polarfast.engine.launch import launch
from polarfast.engine.models import build
from polarfast.engine.recipe import Recipe, load_recipe
from polarfast.engine.run import Run
from polarfast.engine.trainer import evaluate
from polarfast.steering.flops_target import AT_ZERO, FlopsTarget

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "comparison.jsonl"
MODELS = {"resnet20": "ResNet-20", "vgg11-half": "VGG-11, half width"}
CUTS = (0.5, 0.7)
LOW = 12.0  # points
TUNED_AT, TUNED_SEED, HELD_OUT = 0.7, 100, 0.1
TRIES: dict[str, tuple[Any, ...]] = {
    "polarization": ("mean", "none", "mean of MACs"),
    "network-slimming": (5e-4, 1e-3, 2e-3, 4e-3),
    "deephoyer": (2.5e-4, 5e-4, 1e-3, 2e-3),
}


RATED, RATES = ("polarization", "network-slimming", "deephoyer"), (0.005, 0.02, 0.05, 0.1)
#: Of the reference setting: images of each class, epochs of training, share of MACs.
REFERENCE_IMAGES, REFERENCE_EPOCHS, REFERENCE_CUT = {"train": 1000, "test": 300}, 20, 0.5


def recipe(model: str, root: str, seed: int) -> Recipe:
    """The schedule of every method."""
    found = load_recipe(HERE / "cifar10-subset.yaml")
    hardware = dataclasses.replace(found.hardware, threads=1, channels_last=True)
    data = dataclasses.replace(found.data, root=root)
    return dataclasses.replace(
        found, data=data, model=model, seed=seed, precision="bf16", hardware=hardware
    )


def units(chosen: str, macs: Mapping[str, float]) -> Any:
    """What FlopsTarget measures the γ of a layer in; "mean" is what it ships with."""

    def of(self: FlopsTarget, steered: Mapping[str, Tensor]) -> dict[str, float]:
        means = {name: max(float(gamma.mean()), AT_ZERO) for name, gamma in steered.items()}
        if chosen == "none":
            return dict.fromkeys(means, 1.0)
        # A channel that saves more goes earlier: the square root, as γ ÷ ΔMACs itself empties
        # layers in which channels are dear.
        return {name: mean * macs[name] ** 0.5 for name, mean in means.items()}

    return of


@contextlib.contextmanager
def measured_in(chosen: Any, run_recipe: Recipe) -> Iterator[None]:
    """FlopsTarget as it would be with other units, for a try."""
    if chosen not in ("none", "mean of MACs"):
        yield
        return
    model = torch.nn.Module()
    macs: Mapping[str, float] = {}
    if chosen == "mean of MACs":
        model, example = build(run_recipe.model, 10, 3), torch.zeros(1, 3, 32, 32)
        scales = pf.scaling_factors(model, example, residual=run_recipe.sparsity.residual)
        macs = pf.mac_weights(model, example, scales, 0.1, 1.0)
    shipped = FlopsTarget._units
    FlopsTarget._units = units(chosen, macs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        FlopsTarget._units = shipped  # type: ignore[method-assign]


def lines() -> list[dict[str, Any]]:
    """Every finished run."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]


def known(key: Mapping[str, Any]) -> bool:
    """Whether a run is finished."""
    return any(all(line.get(k) == v for k, v in key.items()) for line in lines())


def record(key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**key, **found}) + "\n")
    print({**key, **found}, flush=True)


def carry_out(trial: Trial, folder: Path, test: DataSource) -> dict[str, Any]:
    """One run, and its networks on all test images."""
    path = folder / trial.name
    path.mkdir(parents=True, exist_ok=True)
    if trial.trained is not None:
        adopt_training(folder / trial.trained, path, trial.recipe)
    start = time.perf_counter()
    with (path / "log.txt").open("a", encoding="utf-8") as log:
        results = launch(trial.recipe, path, Console(file=log, width=100))
    assert results is not None
    seconds = time.perf_counter() - start
    run = Run(trial.recipe, path, Workers(trial.recipe.hardware))
    found: dict[str, Any] = {"cut": round(results.macs.cut, 4), "seconds": round(seconds)}
    for name, network in (
        ("pruned", run.networks.slim("pruned")),
        ("finetuned", run.networks.slim()),
    ):
        right = evaluate(network, test, run.workers, trial.recipe.precision)
        found[name] = round(right, 2)
    return found


def tune(model: str, root: str, folder: Path) -> None:
    """All tries, on held-out training images."""
    for method, tries in TRIES.items():
        for tried in tries:
            key = {"stage": "tune", "model": model, "method": method, "tried": tried}
            if known(key):
                continue
            base = recipe(model, root, TUNED_SEED)
            held = dataclasses.replace(base.data, validation=HELD_OUT)
            lams = {} if method == "polarization" else {method: tried}
            made = chains(dataclasses.replace(base, data=held), [method], [TUNED_AT], 1, lams)
            (trial,) = (trial for chain in made for trial in chain if DENSE not in trial.name)
            test = load(dataclasses.replace(held, test_images=0), torch.device("cpu"))
            with measured_in(tried, trial.recipe):
                found = carry_out(trial, folder / "tune" / model / str(tried), test)
            record(key, found)
            shutil.rmtree(folder / "tune" / model / str(tried))


def best(model: str, method: str) -> Any:
    """What "tune" chose for a rival."""
    tries = [
        (line["finetuned"], line["tried"])
        for line in lines()
        if line["stage"] == "tune" and (line["model"], line["method"]) == (model, method)
    ]
    if len(tries) < len(TRIES[method]):
        raise SystemExit(f"{model}, {method}: not all tries have run; run 'tune' first")
    return max(tries, key=lambda pair: pair[0])[1]


def final(model: str, root: str, folder: Path, seed: int, methods: list[str]) -> None:
    """Every method at one seed."""
    rivals = [method for method in TRIES if method in methods and method != "polarization"]
    lams = {method: best(model, method) for method in rivals}
    base = recipe(model, root, seed)
    test = load(dataclasses.replace(base.data, test_images=0), torch.device("cpu"))
    for chain in chains(base, methods, CUTS, 1, lams):
        keys = {trial.name: _key(model, trial, seed) for trial in chain}
        todo = [trial for trial in chain if not known(keys[trial.name])]
        for trial in chain if todo else ():
            found = carry_out(trial, folder / f"final-{model}", test)
            if trial in todo:
                record(keys[trial.name], found)
        for trial in chain:
            shutil.rmtree(folder / f"final-{model}" / trial.name, ignore_errors=True)


def rates(model: str, root: str, folder: Path) -> None:
    """Each method's network, fine-tuned at each learning rate, on held-out training images."""
    base = recipe(model, root, TUNED_SEED)
    held = dataclasses.replace(base.data, validation=HELD_OUT)
    test = load(dataclasses.replace(held, test_images=0), torch.device("cpu"))
    place = folder / "rates" / model
    for method in RATED:
        lams = {} if method == "polarization" else {method: best(model, method)}
        made = chains(dataclasses.replace(base, data=held), [method], [TUNED_AT], 1, lams)
        (first,) = (trial for chain in made for trial in chain if DENSE not in trial.name)
        keys = [{"stage": "rates", "model": model, "method": method, "lr": lr} for lr in RATES]
        trained = None
        for lr, key in zip(RATES, keys, strict=True) if not all(map(known, keys)) else ():
            finetune = dataclasses.replace(first.recipe.finetune, lr=lr)
            changed = dataclasses.replace(first.recipe, finetune=finetune)
            trial = Trial(f"{first.name}-lr{lr:g}", changed, trained)
            found = carry_out(trial, place, test)
            trained = trained or trial.name
            if not known(key):
                record(key, found)
        shutil.rmtree(place, ignore_errors=True)


def reference(root: str, folder: Path, seed: int) -> None:
    """The setting in which the authors' program was run, at one seed."""
    images = folder / "reference" / "images"
    for part, count in REFERENCE_IMAGES.items():
        for of_class in sorted((Path(root) / part).iterdir()):
            (images / part / of_class.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(of_class.iterdir())[:count]:
                link = images / part / of_class.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
    base = recipe("resnet20", str(images), seed)
    data = dataclasses.replace(base.data, train_images=0, test_images=0)
    train = dataclasses.replace(base.train, epochs=REFERENCE_EPOCHS)
    base = dataclasses.replace(base, data=data, train=train)
    test = load(data, torch.device("cpu"))
    for chain in chains(base, ["polarization"], [REFERENCE_CUT], 1, {}):
        for trial in chain:
            key = {**_key("resnet20", trial, seed), "stage": "reference"}
            if not known(key):
                record(key, carry_out(trial, folder / "reference", test))
                shutil.rmtree(folder / "reference" / trial.name)


def _key(model: str, trial: Trial, seed: int) -> dict[str, Any]:
    method = trial.name.rpartition("-seed")[0]
    asked = None
    if method != DENSE:
        method, _, percent = method.rpartition("-")
        asked = float(percent) / 100
    return {"stage": "final", "model": model, "method": method, "asked": asked, "seed": seed}


def finals(
    every: Sequence[dict[str, Any]], model: str
) -> dict[tuple[float, str], dict[int, dict[str, Any]]]:
    """(share asked for, method) -> seed -> run."""
    found: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
    for line in every:
        if (line["stage"], line["model"]) == ("final", model):
            found.setdefault((line["asked"] or 0.0, line["method"]), {})[line["seed"]] = line
    return found


def draw(path: Path) -> None:
    """Fine-tuned accuracy against the share cut; whiskers of one deviation. What lies more than
    LOW points under the best is left out.
    """
    figure, panels = subplots(len(MODELS), 9.5, 4.4)
    shown: dict[str, Any] = {}
    for axes, (model, title) in zip(panels, MODELS.items(), strict=True):
        found = finals(lines(), model)
        best_mean = max(fmean(runs, "finetuned") for runs in found.values())
        for method, (colour, marker) in STYLES.items():
            mine = {asked: runs for (asked, name), runs in sorted(found.items()) if name == method}
            mine = {a: r for a, r in mine.items() if fmean(r, "finetuned") > best_mean - LOW}
            if mine and method == DENSE:
                level = fmean(mine[0.0], "finetuned")
                shown["dense"] = axes.axhline(level, color=colour, linestyle=":", linewidth=1.2)
            elif mine:
                shown[METHODS[method]] = axes.errorbar(
                    [100 * fmean(runs, "cut") for runs in mine.values()],
                    [fmean(runs, "finetuned") for runs in mine.values()],
                    yerr=[deviation(runs, "finetuned") for runs in mine.values()],
                    color=colour,
                    marker=marker,
                    linewidth=1.2,
                    elinewidth=0.8,
                    capsize=2,
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("MACs cut (%)")
        axes.set_xticks([100 * cut for cut in CUTS])
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy, fine-tuned (%)")
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


def fmean(runs: Mapping[int, dict[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs.values())


def deviation(runs: Mapping[int, dict[str, Any]], name: str) -> float:
    values = [run[name] for run in runs.values()]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table() -> None:
    """What there is, as markdown."""
    every = lines()
    for model, title in MODELS.items():
        print(f"\n### {title}\n")
        print("| method | asked | MACs cut % | right after % | fine-tuned % | ours − it | seeds |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        found = finals(every, model)
        order = [DENSE, *METHODS]
        for asked, method in sorted(found, key=lambda row: (row[0], order.index(row[1]))):
            runs, own = found[asked, method], found.get((asked, "polarization"), {})
            against = [own[s]["finetuned"] - runs[s]["finetuned"] for s in runs if s in own]
            pruned = [run["pruned"] for run in runs.values()]
            cells = [
                METHODS.get(method, "dense"),
                f"{asked:.0%}" if asked else "",
                spread([100 * run["cut"] for run in runs.values()], 1),
                spread(pruned) if method not in (DENSE, "uniform") else "",
                spread([run["finetuned"] for run in runs.values()]),
                spread(against) if against and method != "polarization" else "",
                str(len(runs)),
            ]
            print("| " + " | ".join(cells) + " |")
    print("\n| network | method | tried | held-out accuracy % |\n|---|---|---|---:|")
    for line in every:
        if line["stage"] == "tune":
            tried, right = line["tried"], line["finetuned"]
            print(f"| {MODELS[line['model']]} | {line['method']} | {tried} | {right:.2f} |")
    print("\n| network | method | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |")
    print("|---|---|" + "---:|" * len(RATES))
    rated = {
        (line["model"], line["method"], line["lr"]): line["finetuned"]
        for line in every
        if line["stage"] == "rates"
    }
    for model, method in dict.fromkeys(key[:2] for key in rated):
        cells = [f"{rated.get((model, method, lr), math.nan):.2f}" for lr in RATES]
        print(f"| {MODELS[model]} | {METHODS[method]} | " + " | ".join(cells) + " |")
    print("\n| reference setting | MACs cut % | right after % | fine-tuned % | seeds |")
    print("|---|---:|---:|---:|---:|")
    settled: dict[str, list[dict[str, Any]]] = {}
    for line in every:
        if line["stage"] == "reference":
            settled.setdefault(line["method"], []).append(line)
    for method, runs in settled.items():
        cells = [
            METHODS.get(method, DENSE),
            spread([100 * run["cut"] for run in runs], 1),
            spread([run["pruned"] for run in runs]) if method != DENSE else "",
            spread([run["finetuned"] for run in runs]),
            str(len(runs)),
        ]
        print("| " + " | ".join(cells) + " |")
    total = sum(line["seconds"] for line in every)
    print(f"\n{len(every)} runs, {total / 3600:.1f} hours; median {_median(every):.0f} s a run")


def _median(every: list[dict[str, Any]]) -> float:
    return statistics.median(line["seconds"] for line in every) if every else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", choices=("tune", "final", "rates", "reference", "table"))
    parser.add_argument("--root", default="data/cifar10", help="folder with train/ and test/")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--figure", type=Path, help="for the table as a picture")
    parser.add_argument("--folder", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args()
    if options.stage == "table":
        table()
        if options.figure is not None:
            draw(options.figure)
        return
    torch.set_num_threads(1)
    if options.stage == "tune":
        for model in options.models:
            tune(model, options.root, options.folder)
        return
    if options.stage == "rates":
        for model in options.models:
            rates(model, options.root, options.folder)
        return
    if options.stage == "reference":
        for seed in options.seeds:
            reference(options.root, options.folder, seed)
        return
    for seed in options.seeds:
        for model in options.models:
            final(model, options.root, options.folder, seed, options.methods)


if __name__ == "__main__":
    main()
