"""Folders as runs leave them, with made-up numbers that a test can look for."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

import polarfast as pf
from polarfast.engine.results import Pair, Results
from polarfast.planning.pruning_plan import LayerPlan

ODD = """<img src=x onerror=alert(1)> & "it's" {}"""
RECIPE: dict[str, Any] = {
    "data": {"name": "cifar10", "validation": 0.0},
    "model": "resnet56",
    "sparsity": {"lam": 1e-4, "t": 1.2},
    "seed": 0,
}


def widths(layers: int) -> dict[str, int]:
    """Names and widths of as many layers, in three groups as in a CIFAR ResNet."""
    return {
        f"layer{1 + 3 * i // layers}.{i}.bn1.weight": 16 * 2 ** (3 * i // layers)
        for i in range(layers)
    }


def metrics(train: int, finetune: int, done: int) -> list[dict[str, Any]]:
    """The first ``done`` epochs of a run."""
    lines = []
    for index in range(1, done + 1):
        sparse = index <= train
        epoch = index if sparse else index - train
        line: dict[str, Any] = {
            "stage": "sparsity training" if sparse else "fine-tuning",
            "epoch": epoch,
            "epochs": train if sparse else finetune,
            "index": index,
            "loss": 2.3 * 0.98**index,
            "accuracy": 93.0 - 80.0 * 0.9**index,
            "lr": 0.1 if sparse else 0.01,
            "seconds": 10.0,
            "images_per_second": 5000.0,
        }
        if sparse:
            line |= {"cut": 0.5 * index / train, "at_zero": 0.4, "lam": 1e-4, "t": 1.2}
        lines.append(line)
    return lines


def gammas(layers: dict[str, int], epochs: int) -> dict[str, Any]:
    """γ that part: of each layer a third goes to 0, the others to about 0.5."""
    counts = torch.zeros(epochs, len(layers), 100, dtype=torch.int32)
    last = {}
    generator = torch.Generator().manual_seed(0)
    for row, (name, width) in enumerate(layers.items()):
        end = 0.5 + 0.1 * torch.randn(width, generator=generator)
        end[: width // 3] = 0.001
        for epoch in range(epochs):
            share = (epoch + 1) / epochs
            now = 0.5 * (1 - share) + end.clamp(0, 1) * share
            counts[epoch, row] = torch.histc(now, 100, 0, 1).int()
        last[name] = end.clamp(0, 1)
    return {"names": list(layers), "counts": counts, "values_last": last}


def plan(layers: dict[str, int]) -> pf.PruningPlan:
    """What fits :func:`gammas`."""
    return pf.PruningPlan(
        kept={name: torch.arange(width // 3, width) for name, width in layers.items()},
        layers={name: LayerPlan(width, 0.25) for name, width in layers.items()},
        pinned={}, residual="expand", method="valley", fold="exact", inputs={},
        macs_before=125_000_000, macs=66_000_000, params_before=850_000, params=500_000,
        remarks=["the γ of every layer are equal"],
    )  # fmt: skip


RESULTS = Results(
    accuracy_dense=93.5,
    accuracy_pruned=93.25,
    accuracy_finetuned=93.75,
    macs=Pair(125e6, 66e6),
    params=Pair(850e3, 500e3),
    file_bytes=Pair(3.4e6, 2.1e6),
    latency_ms={1: Pair(4.0, 5.0), 64: Pair(80.0, 50.0)},
    epochs=Pair(17, 11.25),
    threads=2,
    verified_error=3e-12,
    seconds=4000.0,
    device="Some CPU",
)


def write_run(
    folder: Path,
    train: int = 12,
    finetune: int = 6,
    layers: int = 6,
    done: int | None = None,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """A run's folder; ``done`` epochs of an unfinished one."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE), encoding="utf-8")
    lines = metrics(train, finetune, train + finetune if done is None else done)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    names = widths(layers)
    if lines:
        torch.save(gammas(names, min(len(lines), train)), folder / "gammas.pt")
    if len(lines) > train or done is None:
        (folder / "plan.json").write_text(plan(names).to_json(), encoding="utf-8")
    if done is None:
        (folder / "results.json").write_text(json.dumps(RESULTS.to_dict()), encoding="utf-8")
    return folder


def four_runs(folder: Path) -> list[Path]:
    """Two finished runs, one that stopped while fine-tuning, one that stopped early; odd names."""
    return [
        write_run(folder / "plain"),
        write_run(folder / ODD, recipe={**RECIPE, "sparsity": {"lam": 3e-4, "t": ODD}}),
        write_run(folder / "pruned", done=14),
        write_run(folder / "early", done=3),
    ]
