"""Where the time goes that MACs do not promise: one forward pass by kind of operator, before and
after a pruning of 54 % of the MACs.

γ are random (each layer's times a factor of its own), widths whole multiples of 8, residual
channels put back ("expand"). Times are those of torch's profiler, per forward pass, medians over
repeats in which dense and slim network take turns. "as deployed" are the same two after `pf.fuse`,
which folds norms into the layers before them.

Expected: convolutions cost in proportion to their MACs or little more, since 1 thread is busy with
them; norms, activations and additions in proportion to channels (which fall by a third where MACs
fall by half) and what ends at full width again, put-backs and additions, not at all.

    OMP_NUM_THREADS=1 python benchmarks/bench_breakdown.py [--models resnet50 ...] [--batch 1]
"""

import argparse
import os
import statistics
import warnings
from collections import defaultdict
from collections.abc import Sequence

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read as torch is loaded

import torch
import torchvision
from bench_latency import randomize
from torch import nn
from torch.profiler import ProfilerActivity, profile

import polarfast as pf

MODELS = ("resnet50", "mobilenet_v2", "vgg16_bn")
CUT = 0.54
#: Part of an operator's name -> kind; the first that fits.
KINDS = {
    "put_back": "put-backs",
    "convolution": "convolutions",
    "conv": "convolutions",
    "batch_norm": "norms",
    "relu": "activations",
    "hardtanh": "activations",
    "clamp": "activations",
    "add_": "additions",
    "addmm": "linear",
}
ORDER = ("convolutions", "depthwise", "norms", "put-backs", "activations", "additions", "linear")
REST = "rest"


def kind_of(name: str, shapes: Sequence[Sequence[int]]) -> str:
    kind = next((kind for part, kind in KINDS.items() if part in name), REST)
    weight = shapes[1] if len(shapes) > 1 else []
    depthwise = kind == "convolutions" and len(weight) == 4 and weight[1] == 1
    return "depthwise" if depthwise else kind


@torch.no_grad()
def once(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """ms of one forward pass by kind."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        model(x)
    times: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        times[kind_of(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e3
    return times


def compared(
    dense: nn.Module, slim: nn.Module, x: torch.Tensor, repeats: int
) -> list[dict[str, float]]:
    """Medians of both, in turns."""
    found: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for _ in range(repeats):
        for model, mine in zip((dense, slim), found, strict=True):
            with torch.no_grad():
                model(x)  # warm
            mine.append(once(model, x))
    kinds = (*ORDER, REST)
    return [{k: statistics.median(t.get(k, 0.0) for t in mine) for k in kinds} for mine in found]


def report(title: str, dense: dict[str, float], slim: dict[str, float], macs: float) -> None:
    shown = [
        kind for kind in (*ORDER, REST) if dense[kind] + slim[kind] > 0.01 * sum(dense.values())
    ]
    print(f"\n{title}: MACs × {macs:.2f}\n")
    print("| | " + " | ".join(shown) + " | all |")
    print("|---|" + "---:|" * (len(shown) + 1))
    for name, times in (("dense, ms", dense), ("slim, ms", slim)):
        cells = [f"{times[kind]:.2f}" for kind in shown] + [f"{sum(times.values()):.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    ratios = [f"{slim[kind] / dense[kind]:.2f}" if dense[kind] > 0.01 else "new" for kind in shown]
    ratios.append(f"{sum(slim.values()) / sum(dense.values()):.2f}")
    print("| slim ÷ dense | " + " | ".join(ratios) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x = torch.randn(options.batch, 3, options.size, options.size)
    for name in options.models:
        torch.manual_seed(0)
        dense = torchvision.models.get_model(name).eval()
        scales = pf.scaling_factors(dense, x, residual="expand")
        randomize(scales, 0)
        plan = pf.plan(dense, x, scales, cut=CUT, round_to=8)
        slim = pf.slim(dense, plan, verify=False)
        left = 1 - plan.flops_reduction
        where = f"{name}, batch {options.batch}, {options.size} px"
        report(where, *compared(dense, slim, x, options.repeats), left)
        deployed = pf.fuse(dense, x), pf.fuse(slim)
        report(f"{where}, as deployed", *compared(*deployed, x, options.repeats), left)
        last = x.to(memory_format=torch.channels_last)
        laid_out = [network.to(memory_format=torch.channels_last) for network in (dense, slim)]
        report(f"{where}, channels_last", *compared(*laid_out, last, options.repeats), left)


if __name__ == "__main__":
    main()
