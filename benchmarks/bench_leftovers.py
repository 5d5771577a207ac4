"""What removed channels leave behind: accuracy right before and right after pruning, on digits.

Networks whose constants do not fold exactly (squeeze-excite gates, padded depthwise convolutions),
trained with FlopsTarget for half of the MACs: as it is (β goes to 0 with γ where that is needed),
with β left alone, and with gates.

    python benchmarks/bench_leftovers.py [--steps 600] [--networks mobilenet_v2 ...]

About 20 minutes on one core.
"""

import argparse
import itertools
import warnings

import torch
import torch.nn.functional as F
from bench_search import TRAIN_IMAGES, digits, rate, shifted
from bench_target import accuracy
from torch import nn
from torchvision import models

import polarfast as pf

BATCH, PEAK, CUT = 32, 0.05, 0.5
NETWORKS = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
WAYS = {"β along": {}, "β left alone": {"with_bias": False}, "gates": {}}


def network(name: str) -> nn.Module:
    """One of torchvision's, for grey images, its first strides taken out."""
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=10, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # 0.01 takes longer than these trainings
    stem = model.features[0]
    stem[0] = nn.Conv2d(1, stem[0].out_channels, 3, padding=1, bias=False)
    return model


def train(name: str, way: str, steps: int) -> tuple[float, float, float, int]:
    """Share cut, accuracy before and after pruning, and how many readers are not exact."""
    images, labels = digits()
    example = images[:1]
    model = network(name)
    if way == "gates":
        scales = pf.add_gates(model, example, residual="expand")
    else:
        scales = pf.scaling_factors(model, example, residual="expand")
        pf.init_scales(scales, 0.5)
    reg = pf.FlopsTarget(model, example, scales, CUT, steps=steps, **WAYS[way])
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(TRAIN_IMAGES, generator=generator).split(BATCH) for _ in iter(int, 1))
    batches = itertools.islice(itertools.chain.from_iterable(orders), steps)
    for step, rows in enumerate(batches):
        model.train()
        optimizer.param_groups[0]["lr"] = rate(step, steps, PEAK)
        loss = F.cross_entropy(model(shifted(images[rows], generator)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        pf.step(optimizer, scales, reg)
    plan = pf.plan(model.eval(), example, scales)
    before = accuracy(model, images, labels)
    after = accuracy(pf.slim(model, plan), images, labels)
    for reader, why in plan.inexact.items():
        print(f"  {reader}: {why}")
    return plan.flops_reduction, before, after, len(plan.inexact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    print("| network | | MACs cut % | before % | right after % | readers that are not exact |")
    print("|---|---|---:|---:|---:|---:|")
    for name, way in itertools.product(options.networks, WAYS):
        cut, before, after, inexact = train(name, way, options.steps)
        cells = f"{100 * cut:.1f} | {before:.2f} | {after:.2f} | {inexact}"
        print(f"| {name} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
