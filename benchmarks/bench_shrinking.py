"""What a pruned network costs to train: MACs and time of the whole run beside one dense training.

ResNet-20 and a VGG-11 of half the width on scikit-learn's digits (16x16), 30 + 15 epochs for all:
the dense network; FlopsTarget for half of the MACs and fine-tuning, the network kept whole until it
is pruned; and the same, made smaller while it trains. Runs follow one another in full, so that the
machine must be quiet.

    python benchmarks/bench_shrinking.py [--seeds 1]

About 4 minutes a network and seed on one core.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from polarfast.engine.campaigns.rivals import DENSE, method_recipe
from polarfast.engine.launch import launch
from polarfast.engine.recipe import Recipe, load_recipe

MODELS = {"resnet20": "ResNet-20", "vgg11-half": "VGG-11, half width"}
CUT = 0.5


def recipes(base: Recipe) -> dict[str, Recipe]:
    """The three ways to spend the epochs."""
    steered = method_recipe(base, "polarization", CUT)
    whole = dataclasses.replace(steered.sparsity, shrink=False)
    return {
        "dense": method_recipe(base, DENSE, CUT),
        "pruned after training": dataclasses.replace(steered, sparsity=whole),
        "smaller while it trains": steered,
    }


def run(recipe: Recipe) -> dict[str, Any]:
    """Figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with (path / "log").open("w", encoding="utf-8") as log:
            results = launch(recipe, path / "run", Console(file=log, width=100))
    assert results is not None
    return {
        "cut": results.macs.cut,
        "epochs": results.epochs,
        "seconds": results.seconds,
        "accuracy": results.accuracy_finetuned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = load_recipe("demo")
    print("| network | seed | | MACs cut % | training MACs ÷ dense | time ÷ dense | accuracy % |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for model in MODELS:
        for seed in range(options.seeds):
            base = dataclasses.replace(found, model=model, seed=seed)
            dense = 1.0
            for name, recipe in recipes(base).items():
                got = run(recipe)
                dense = got["seconds"] if name == "dense" else dense
                macs = got["epochs"].slim / got["epochs"].dense
                cells = [MODELS[model], str(seed), name, f"{100 * got['cut']:.1f}"]
                cells += [f"{macs:.2f}", f"{got['seconds'] / dense:.2f}", f"{got['accuracy']:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
