"""For equal time: accuracy of a network pruned by MACs beside one pruned by latency.

Polarization cuts half of the MACs, widths in multiples of 8; what share of the *time* that is, the
network's latency table says (float32, batch 64, one thread). A second training, of the same seed,
asks `FlopsTarget` for that share of the time. Both are fine-tuned, tested on all test images and
timed in turns with the dense network.

Expected: within the spread of the seeds, in either direction: the networks are small, and where
both spend equal time there are few channels to trade. Latency gets its time with fewer channels
taken from layers that are slow for their MACs, so a smaller cut of MACs.

    OMP_NUM_THREADS=1 python benchmarks/bench_equal_latency.py --root CIFAR10_AS_A_FOLDER
        [--model resnet20] [--seeds 1 2] [--folder DIR]
    OMP_NUM_THREADS=1 python benchmarks/bench_equal_latency.py --seeds 1 2 3     # digits

Some 9 minutes a seed on CIFAR-10's subset, 4 on digits. Finished runs stay in the folder.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_comparison import recipe as subset_recipe
from rich.console import Console

import polarfast as pf
from polarfast.engine.campaigns.comparison import spread
from polarfast.engine.campaigns.rivals import method_recipe
from polarfast.engine.data.source import load
from polarfast.engine.distributed import Workers
from polarfast.engine.launch import launch
from polarfast.engine.models import build
from polarfast.engine.recipe import Recipe, load_recipe
from polarfast.engine.run import Run
from polarfast.engine.trainer import evaluate
from polarfast.profiling import median_latencies

CUT, BATCH, STEP = 0.5, 64, 8


def base_recipe(model: str, root: str | None, seed: int) -> Recipe:
    if root is not None:
        return subset_recipe(model, root, seed)
    found = load_recipe("demo")
    hardware = dataclasses.replace(found.hardware, threads=1)
    return dataclasses.replace(found, model=model, seed=seed, hardware=hardware)


def trained(recipe: Recipe, folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        launch(recipe, folder, Console(file=log, width=100))
    return Run(recipe, folder, Workers(recipe.hardware))


def read_plan(folder: Path) -> pf.PruningPlan:
    return pf.PruningPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))


def by_both(base: Recipe, table_file: Path, folder: Path, x: torch.Tensor) -> list[dict[str, Any]]:
    """The figures of the network pruned by MACs, then of the one pruned by latency."""
    table = pf.LatencyTable.load(table_file)
    steered = method_recipe(base, "polarization", CUT)
    rounded = dataclasses.replace(steered.pruning, round_to=STEP)
    runs = [trained(dataclasses.replace(steered, pruning=rounded), folder / "macs")]
    dense = runs[0].networks.plain_dense()
    share = 1 - table.latency(read_plan(folder / "macs"), dense, x) / table.ms
    timed = dataclasses.replace(rounded, of="latency", latency=str(table_file), round_to=1)
    sparsity = dataclasses.replace(steered.sparsity, cut=share)
    recipe = dataclasses.replace(steered, pruning=timed, sparsity=sparsity)
    runs.append(trained(recipe, folder / "latency"))
    slims = [run.networks.slim() for run in runs]
    whole, *times = median_latencies([dense, *slims], x, seconds=10.0)
    test = load(dataclasses.replace(base.data, test_images=0), torch.device("cpu"))
    found = []
    for run, slim, ms, name in zip(runs, slims, times, ("MACs", "latency"), strict=True):
        plan = read_plan(folder / name.lower())
        found.append(
            {
                "by": name,
                "asked": CUT if name == "MACs" else share,
                "macs": plan.flops_reduction,
                "predicted": 1 - table.latency(plan, dense, x) / table.ms,
                "measured": 1 - ms / whole,
                "accuracy": evaluate(slim, test, run.workers, base.precision),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", help="CIFAR-10 as a folder with train/ and test/; else digits")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/equal-latency"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    every: dict[str, list[dict[str, Any]]] = {"MACs": [], "latency": []}
    folder = options.folder / ("cifar10" if options.root else "digits")
    for seed in options.seeds:
        base = base_recipe(options.model, options.root, seed)
        data = load(base.data, torch.device("cpu"))
        x = data.example(BATCH)
        table_file = folder / "table.json"
        if not table_file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            model = build(options.model, data.classes, data.image_shape[0])
            pf.LatencyTable.measure(model, x, step=STEP, seconds=30.0).save(table_file)
        for figures in by_both(base, table_file, folder / f"seed{seed}", x):
            print(
                seed, {k: v if k == "by" else round(v, 4) for k, v in figures.items()}, flush=True
            )
            every[figures["by"]].append(figures)
    print("\n| pruned by | MACs cut % | time cut %, predicted | measured | fine-tuned % | seeds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, runs in every.items():
        cells = [
            spread([100 * run[key] for run in runs], 1) for key in ("macs", "predicted", "measured")
        ]
        cells.append(spread([run["accuracy"] for run in runs]))
        print(f"| {name} | " + " | ".join(cells) + f" | {len(runs)} |")
    ahead = [b["accuracy"] - a["accuracy"] for a, b in zip(*every.values(), strict=True)]
    speed = [
        statistics.fmean((1 - run["macs"]) / (1 - run["measured"]) for run in runs)
        for runs in every.values()
    ]
    print(f"\nlatency − MACs: {spread(ahead)} points, seed by seed")
    print(f"speed-up ÷ MACs ratio: {speed[0]:.2f} by MACs, {speed[1]:.2f} by latency")


if __name__ == "__main__":
    main()
