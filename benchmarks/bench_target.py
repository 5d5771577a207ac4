"""Does FlopsTarget keep its word? What it cut beside what was asked, on digits.

Four networks (a small residual one, ResNet-20, a VGG, MobileNetV2 with gates) × SGD, SGD with
momentum, Adam × 150, 600 and 3,000 steps × 30, 50 and 70 % of the MACs. A training that ends more
than a point off must have warned. Learning rates fall in a cosine to 0.

    python benchmarks/bench_target.py [--steps 150 600] [--networks ResNet-20 …] [--seeds 0 1 …]
        [--optimizers "SGD, lr 0.1" …] [--folder bench_target]

About 3 hours in all on one core, 30 minutes without the 3,000 steps. Each result is a line of a
file in the folder, so that a killed run goes on; the table is printed at the end.
"""

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_search import TRAIN_IMAGES, digits, shifted
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import build

BATCH = 32
CUTS = (0.3, 0.5, 0.7)
OPTIMIZERS = {
    "SGD, lr 0.1": lambda params: torch.optim.SGD(params, 0.1),
    "SGD, lr 0.05, momentum 0.9": lambda params: torch.optim.SGD(
        params, 0.05, momentum=0.9, weight_decay=5e-4
    ),
    "Adam, lr 3e-3": lambda params: torch.optim.Adam(params, 3e-3),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(channels, channels), nn.ReLU(), *conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def conv(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)]


def small() -> nn.Module:
    return nn.Sequential(
        *conv(1, 24), nn.ReLU(), Block(24), *conv(24, 48, 2), nn.ReLU(), Block(48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    n_in = 1
    for width in (32, 32, 0, 64, 64, 0, 128, 128, 0, 128, 128):
        if width:
            layers += [*conv(n_in, width), nn.ReLU()]
            n_in = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def mobilenet() -> nn.Module:
    from torchvision.models import MobileNetV2

    setting = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 3, 2], [6, 96, 2, 1]]
    model = MobileNetV2(
        num_classes=10, width_mult=0.5, inverted_residual_setting=setting, dropout=0.0
    )
    stem = model.features[0]
    stem[0] = nn.Conv2d(1, stem[0].out_channels, 3, padding=1, bias=False)
    return model


NETWORKS = {
    "small": small,
    "ResNet-20": lambda: build("resnet20", 10, 1),
    "VGG": vgg,
    "MobileNetV2, gates": mobilenet,
}


def network(name: str, example: Tensor, seed: int) -> tuple[nn.Module, pf.ScalingFactors]:
    """A fresh network and its scaling factors: γ at 0.5, or gates at 1."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    if "gates" in name:
        return model, pf.add_gates(model, example, residual="expand")
    scales = pf.scaling_factors(model, example, residual="expand")
    pf.init_scales(scales, 0.5)
    return model, scales


def train(name: str, optimizer_name: str, steps: int, cut: float, seed: int) -> dict[str, Any]:
    """One training: what was cut, whether it warned, accuracies before and after pruning."""
    images, labels = digits()
    example = images[:1]
    model, scales = network(name, example, seed)
    reg = pf.FlopsTarget(model, example, scales, cut, steps=steps)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    peak = optimizer.param_groups[0]["lr"]
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(TRAIN_IMAGES, generator=generator).split(BATCH) for _ in iter(int, 1))
    batches = itertools.islice(itertools.chain.from_iterable(orders), steps)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, rows in enumerate(batches):
            model.train()
            optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(model(shifted(images[rows], generator)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            pf.step(optimizer, scales, reg)
        plan = pf.plan(model.eval(), example, scales)
        slim = pf.slim(model, plan)
    return {
        "network": name,
        "optimizer": optimizer_name,
        "steps": steps,
        "cut": cut,
        "seed": seed,
        "got": plan.flops_reduction,
        "warned": sum(str(w.message).startswith("FlopsTarget") for w in caught),
        "dense": accuracy(model, images, labels),
        "slim": accuracy(slim, images, labels),
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """On the test images, in percent."""
    right = model.eval()(images[TRAIN_IMAGES:]).argmax(1) == labels[TRAIN_IMAGES:]
    return 100 * float(right.float().mean())


def table(results: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row for each network, optimizer, number of steps and seed."""
    rows: dict[tuple[str, str, int, int], dict[float, str]] = {}
    for r in results:
        shown = f"{100 * r['got']:.1f}" + (" warned" if r["warned"] else "")
        cell = f"{shown} ({r['slim']:.1f})"
        key = (r["network"], r["optimizer"], r["steps"], r["seed"])
        rows.setdefault(key, {})[r["cut"]] = cell
    heads = " | ".join(f"asked {100 * cut:g} %" for cut in CUTS)
    lines = [f"| network | optimizer | steps | seed | {heads} |"]
    lines.append("|---|---|---:|---:|" + "---:|" * len(CUTS))
    for (name, optimizer, steps, seed), cells in rows.items():
        shown = " | ".join(cells.get(cut, "") for cut in CUTS)
        lines.append(f"| {name} | {optimizer} | {steps:,} | {seed} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[150, 600, 3000])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument(
        "--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("bench_target"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = {(r["network"], r["optimizer"], r["steps"], r["cut"], r["seed"]) for r in done}
    asked = (options.steps, options.networks, options.optimizers, CUTS, options.seeds)
    for steps, name, optimizer, cut, seed in itertools.product(*asked):
        if (name, optimizer, steps, cut, seed) in keys:
            continue
        result = train(name, optimizer, steps, cut, seed)
        done.append(result)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        off = 100 * abs(result["got"] - cut)
        print(f"{name}, {optimizer}, {steps} steps, {cut:.0%}: {off:.1f} points off", flush=True)
    print(table(done))
    silent = [r for r in done if abs(r["got"] - r["cut"]) > 0.01 and not r["warned"]]
    near = sum(abs(r["got"] - r["cut"]) <= 0.01 for r in done)
    print(f"\n{near} of {len(done)} within a point; {len(silent)} of the others without a warning")


if __name__ == "__main__":
    main()
