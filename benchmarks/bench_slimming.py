"""Time from a trained network to its slim form, beside torch-pruning.

Trace, plan and slim (`verify=False`) of torchvision networks at 64 px with random γ, β and
statistics, half of the channels of every layer that takes part removed, constants of the removed
ones folded into their readers ("exact"). Beside it, in turns, torch-pruning (PyPI), which drops
these constants, on copies made beforehand: "same channels" is its dependency graph and the pruning
of exactly those channels, given to it layer by layer; "its pruner" is what its users call
(`BNScalePruner`, half of everything, the classifier left out), which finds and ranks groups and
also prunes channels that meet in additions and concatenations. Warm; medians.

Expected, on 2 free cores: ResNet-50 within 0.15 s, DenseNet-121 0.4 s, DenseNet-201 1 s in all;
torch-pruning at least 8 times as long. Where other programs compete for the cores only the ratios
mean much.

Found: the ratio holds for its pruner on DenseNets alone, whose groups it takes seconds to find. On
networks whose channels meet in few places a graph and a few slices are quick, and the constants
that it does not work out are most of the time here: see benchmarks/results/slimming.md.

    python benchmarks/bench_slimming.py [--models resnet50 ...] [--repeats 7] [--threads 2]
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch_pruning as tp
import torchvision
from torch import nn

import polarfast as pf

GOALS = {
    "resnet18": None,
    "resnet50": 0.15,
    "densenet121": 0.4,
    "densenet201": 1.0,
    "mobilenet_v2": None,
}
Clock = Callable[[], float]


@torch.no_grad()
def trained(name: str) -> nn.Module:
    """A network in the state of a trained one, as far as pruning is concerned."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1)
            module.bias.normal_(std=0.3)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def halve(scales: pf.ScalingFactors) -> None:
    """Set half of every layer's γ to 0."""
    for gamma in scales.values():
        gamma[torch.randperm(gamma.numel())[: gamma.numel() // 2]] = 0


def ours(model: nn.Module, x: torch.Tensor, clock: Clock) -> list[float]:
    """Seconds for trace, plan and slim."""
    times = [clock()]
    scales = pf.scaling_factors(model, x)
    times.append(clock())
    plan = pf.plan(model, x, scales, method="fixed")
    times.append(clock())
    pf.slim(model, plan, verify=False)
    times.append(clock())
    return [end - start for start, end in zip(times, times[1:], strict=False)]


def same_channels(
    model: nn.Module, x: torch.Tensor, gone: dict[str, list[int]], clock: Clock
) -> float:
    """Seconds for torch-pruning's graph and for pruning these channels of these norms."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    gc.collect()
    start = clock()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    for name, channels in gone.items():
        prune = tp.prune_batchnorm_out_channels
        graph.get_pruning_group(modules[name], prune, idxs=channels).prune()
    return clock() - start


def its_pruner(model: nn.Module, x: torch.Tensor, clock: Clock) -> float:
    """Seconds for torch-pruning's pruner, by γ."""
    model = copy.deepcopy(model)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)]
    gc.collect()
    start = clock()
    importance = tp.importance.BNScaleImportance()
    pruner = tp.pruner.BNScalePruner(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=classifier
    )
    pruner.step()
    return clock() - start


def compare(name: str, repeats: int, clock: Clock) -> str:
    """A line of the table."""
    model, x = trained(name), torch.rand(1, 3, 64, 64)
    scales = pf.scaling_factors(model, x)
    halve(scales)
    plan = pf.plan(model, x, scales, method="fixed", fold="none")
    gone = {}
    for layer, kept in plan.kept.items():
        every = range(scales[layer].numel())
        gone[layer.removesuffix(".weight")] = sorted(set(every) - set(kept.tolist()))
    turns = []
    for _ in range(repeats + 1):
        gc.collect()
        own = ours(model, x, clock)
        turns.append((own, same_channels(model, x, gone, clock), its_pruner(model, x, clock)))
    return line(name, turns[1:])


def line(name: str, turns: list[tuple[list[float], float, float]]) -> str:
    """Medians."""
    own, same, pruner = zip(*turns, strict=True)
    totals = [sum(parts) for parts in own]
    parts = [statistics.median(column) for column in zip(*own, strict=True)]
    goal = GOALS.get(name)
    cells = [name, *(f"{seconds:.3f}" for seconds in (*parts, statistics.median(totals)))]
    cells += [f"{min(totals):.3f}", "" if goal is None else f"{goal:g}"]
    for rival in (same, pruner):
        ratio = statistics.median(b / a for a, b in zip(totals, rival, strict=True))
        cells += [f"{statistics.median(rival):.3f}", f"{ratio:.1f}×"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(GOALS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, not wall-clock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(
        f"Seconds, {'CPU time' if options.cpu_time else 'wall-clock'}, {options.threads} threads, "
        f"median of {options.repeats}; torch {torch.__version__}, torch-pruning "
        f"{version('torch-pruning')}\n"
    )
    print(
        "| network | trace | plan | slim | in all | best | goal | same channels | ratio "
        "| its pruner | ratio |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in options.models:
        print(compare(name, options.repeats, clock), flush=True)


if __name__ == "__main__":
    main()
