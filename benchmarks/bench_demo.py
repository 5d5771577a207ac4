"""The demo's claim: the fine-tuned slim network beside a dense one trained as long, over seeds.

    python benchmarks/bench_demo.py [--quick] [--seeds 3]

Both train for the same number of epochs in all, with the same batches, optimizer and augmentation;
the dense network's cosine spans the whole, as suits it best. Takes about 4 minutes a seed on one
core (--quick: 1 minute).
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from polarfast.engine.campaigns.rivals import DENSE, method_recipe
from polarfast.engine.distributed import Workers
from polarfast.engine.recipe import Recipe, load_recipe
from polarfast.engine.run import Run


def dense_accuracy(recipe: Recipe) -> float:
    """Accuracy (%) of the dense network after as many epochs as the slim one had in all."""
    stage = dataclasses.replace(recipe.train, epochs=recipe.train.epochs + recipe.finetune.epochs)
    dense = dataclasses.replace(method_recipe(recipe, DENSE, 0.5), train=stage)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(dense, Path(folder), Workers(recipe.hardware))
        run.execute(until="train")
        return run.facts["accuracy_dense"]


def slim_run(recipe: Recipe) -> tuple[dict[str, float], float]:
    """What became known during the run, and the share of the MACs cut (%)."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, Path(folder), Workers(recipe.hardware))
        run.execute()
        return run.facts, 100 * run.facts["cut"]


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Slim against dense, over seeds.")
    parser.add_argument("--quick", action="store_true", help="the recipe of `demo --quick`")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = load_recipe("demo-quick" if arguments.quick else "demo")
    names = ("MACs cut", "dense", "sparse", "pruned", "fine-tuned")
    columns: dict[str, list[float]] = {name: [] for name in names}
    print("accuracy in %; sparse: after sparsity training; pruned: right after pruning")
    print("seed  " + "".join(f"{name:>16}" for name in names) + "       seconds")
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        recipe = dataclasses.replace(base, seed=seed)
        facts, cut = slim_run(recipe)
        row = [cut, dense_accuracy(recipe)]
        row += [facts[f"accuracy_{stage}"] for stage in ("dense", "pruned", "finetuned")]
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
        seconds = time.perf_counter() - start
        print(
            f"{seed:>4}  " + "".join(f"{v:>16.2f}" for v in row) + f"{seconds:>14.0f}", flush=True
        )
    print("mean  " + "".join(f"{spread(columns[name]):>16}" for name in names))
    means = {name: statistics.mean(values) for name, values in columns.items()}
    print(
        f"fine-tuned - dense:  {means['fine-tuned'] - means['dense']:+.2f} points (at least -0.5)"
    )
    print(f"pruned - sparse:     {means['pruned'] - means['sparse']:+.2f} points (at least -1)")


if __name__ == "__main__":
    main()
