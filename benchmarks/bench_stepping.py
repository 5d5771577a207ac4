"""What `pf.step` costs over `optimizer.step()`: the 53 BatchNorm weights of ResNet-50 (26,560 γ).

    OMP_NUM_THREADS=1 python benchmarks/bench_stepping.py

The optimizer also holds 108 small parameters, as many as ResNet-50 has beside its γ, or none. Times
are CPU time of this process in µs, medians of 150 pairs of batches of 20 calls, the two in turns;
the ratio is the median over the pairs, with its quartiles.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import polarfast as pf

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
WIDTHS = [64] + [
    width
    for planes, blocks in _STAGES
    for block in range(blocks)
    for width in (planes, planes, 4 * planes, *([4 * planes] if block == 0 else []))
]


class SubclassedSGD(torch.optim.SGD):
    """Not torch's SGD to polarfast: subgradient, optimizer, clamp."""


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-6, 0.9),
    "SGD foreach=True": lambda p: torch.optim.SGD(p, 1e-6, 0.9, foreach=True),
    "SGD fused=True": lambda p: torch.optim.SGD(p, 1e-6, 0.9, fused=True),
    "SGD subclass, fused=True": lambda p: SubclassedSGD(p, 1e-6, 0.9, fused=True),
    "AdamW fused=True": lambda p: torch.optim.AdamW(p, 1e-6, fused=True),
}


class Paired(NamedTuple):
    """Medians in µs, and the ratio of second to first with its quartiles."""

    first: float
    second: float
    ratio: float
    low: float
    high: float


def paired(
    first: Callable[[], object], second: Callable[[], object], calls: int = 20, pairs: int = 150
) -> Paired:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for function, found in zip((first, second), times, strict=True):
            function()
            start = time.process_time()
            for _ in range(calls):
                function()
            found.append((time.process_time() - start) / calls * 1e6)
    low, ratio, high = statistics.quantiles((b / a for a, b in zip(*times, strict=True)), n=4)
    return Paired(*map(statistics.median, times), ratio, low, high)


def autograd_form(gammas: list[nn.Parameter], lam: float, t: float) -> None:
    """Eq. 2 as it is usually written, its backward, and the clamp."""
    mean = torch.cat(list(gammas)).mean()
    penalty = sum((t * gamma.abs() - (gamma - mean).abs()).sum() for gamma in gammas)
    (lam * penalty).backward()
    with torch.no_grad():
        for gamma in gammas:
            gamma.clamp_(0, 1)


def main() -> None:
    assert len(WIDTHS) == 53 and sum(WIDTHS) == 26_560
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # γ drift over the edge between the two calls
    reg = pf.Polarization(lam=1e-4, t=1.2)
    print(f"{'':28}{'optimizer.step':>16}{'pf.step':>10} µs   {'ratio':>8}")
    cases = [(name, make, 108) for name, make in OPTIMIZERS.items()]
    cases.append(("SGD fused=True, γ alone", OPTIMIZERS["SGD fused=True"], 0))
    for name, make, count in cases:
        torch.manual_seed(0)
        gammas = [nn.Parameter(torch.rand(width)) for width in WIDTHS]
        others = [nn.Parameter(torch.rand(8)) for _ in range(count)]
        for param in gammas + others:
            param.grad = 1e-3 * torch.randn_like(param)
        scales = pf.ScalingFactors({f"bn{i}.weight": g for i, g in enumerate(gammas)})
        optimizer = make(gammas + others)

        def ours(optimizer: Any = optimizer, scales: Any = scales) -> None:
            pf.step(optimizer, scales, reg)

        found = paired(optimizer.step, ours)
        print(f"{name:28}{found.first:16.0f}{found.second:10.0f}      {spread(found)}")

    def written_out() -> None:  # with the last case's optimizer, of γ alone
        autograd_form(gammas, 1e-4, 1.2)
        optimizer.step()

    found = paired(ours, written_out, calls=3)
    print(f"Eq. 2 by autograd, SGD and clamp ÷ pf.step, γ alone: {spread(found)}")


def spread(found: Paired) -> str:
    return f"{found.ratio:8.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
