"""What `CutPredictor`'s quick way saves: the share of MACs that a plan made now would cut.

    OMP_NUM_THREADS=1 python benchmarks/bench_prediction.py

Its callers are `FlopsTarget`, which looks every ten training steps and asks for a dozen shares at
each look, and the engine's display. Times are CPU time of this process, medians of 15 rounds with
their smallest and largest; in each round all ways take turns. The ways must agree, or this ends.

Expected before the first measurement: counting channels over thresholds and adding up the
products of some 50 calls, 0.1 to 0.2 ms; choosing channels class by class as `plan` does, without
running the network, milliseconds; a plan, which traces and runs it, a hundred or more.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import resnet
from polarfast.planning.counting import CutCounter

ROUNDS = 15


def milliseconds(functions: dict[str, Callable[[], float]], calls: int) -> dict[str, list[float]]:
    """ms of one call, for each round; first checks that all return the same."""
    found = {name: function() for name, function in functions.items()}
    assert max(found.values()) - min(found.values()) < 1e-9, found
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(calls):
                function()
            times[name].append((time.process_time() - start) / calls * 1e3)
    return times


def by_selection(predictor: pf.CutPredictor) -> float:
    """The share by choosing channels class by class: what `cut` does where it has no quick way."""
    quick = predictor._counter.quick
    predictor._counter.quick = False
    try:
        return predictor.cut()
    finally:
        predictor._counter.quick = quick


def show(title: str, times: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    least = statistics.median(next(iter(times.values())))
    for name, each in times.items():
        median, spread = statistics.median(each), f"{min(each):.3f} to {max(each):.3f}"
        print(f"  {name:44}{median:9.3f} ms  {spread:>18}{median / least:9.1f}×")


def compare(name: str, model: nn.Module, x: Tensor) -> None:
    scales = pf.scaling_factors(model, x, residual="expand")
    with torch.no_grad():
        for gamma in scales.values():
            gamma.copy_(torch.where(torch.rand_like(gamma) < 0.5, 0.0, 0.3 + 0.7 * gamma))
    predictor = pf.CutPredictor(model, x, scales)
    ways = {
        "CutPredictor.cut()": predictor.cut,
        "the same, class by class": lambda: by_selection(predictor),
    }
    show(f"{name}, {len(scales)} layers, {scales.numel():,} γ", milliseconds(ways, 20))
    plans = {"a plan": lambda: pf.plan(model, x, scales).flops_reduction}
    show(f"{name}, made anew", milliseconds(plans, 1))
    counter: CutCounter = predictor._counter
    widths = [size // 2 for size in counter._sizes]
    stays = torch.rand(counter._channels.graph.count) < 0.5
    times = milliseconds({"by widths": lambda: counter._widths.macs(widths)}, 50)
    times |= milliseconds({"by classes": lambda: counter._cost(stays)}, 50)
    show(f"{name}, MACs alone", times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from torchvision.models import resnet50

    compare("ResNet-20", resnet(20), torch.randn(1, 3, 32, 32))
    compare("ResNet-50", resnet50(), torch.randn(1, 3, 64, 64))


if __name__ == "__main__":
    main()
