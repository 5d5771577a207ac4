"""What `pf.step` costs over `optimizer.step()`: the 53 BatchNorm weights of ResNet-50 (26,560 γ).

    OMP_NUM_THREADS=1 python benchmarks/bench_stepping.py

The optimizer also holds 108 small parameters, as many as ResNet-50 has beside its γ. Times are CPU
time of this process in µs, the least of 15 batches of 200 calls, the two calls in turns.
"""

import time
import warnings
from collections.abc import Callable

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


def microseconds(*functions: Callable[[], object], calls: int = 200) -> list[float]:
    batches: list[list[float]] = [[] for _ in functions]
    for _ in range(15):
        for function, times in zip(functions, batches, strict=True):
            function()
            start = time.process_time()
            for _ in range(calls):
                function()
            times.append((time.process_time() - start) / calls * 1e6)
    return [min(times) for times in batches]


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
    warnings.simplefilter("ignore", UserWarning)  # γ drift over the edge between the two calls
    reg = pf.Polarization(lam=1e-4, t=1.2)
    print(f"{'':26}{'optimizer.step':>16}{'pf.step':>10}{'difference':>12}   µs")
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        gammas = [nn.Parameter(torch.rand(width)) for width in WIDTHS]
        others = [nn.Parameter(torch.rand(8)) for _ in range(108)]
        for param in gammas + others:
            param.grad = 1e-3 * torch.randn_like(param)
        scales = pf.ScalingFactors({f"bn{i}.weight": g for i, g in enumerate(gammas)})
        optimizer = make(gammas + others)
        plain, ours = microseconds(optimizer.step, lambda o=optimizer, s=scales: pf.step(o, s, reg))
        print(f"{name:26}{plain:16.0f}{ours:10.0f}{ours - plain:+12.0f}")
    (cost,) = microseconds(lambda: autograd_form(gammas, 1e-4, 1.2), calls=20)
    print(f"{'autograd form of Eq. 2, its backward and the clamp':62}{cost:.0f}")


if __name__ == "__main__":
    main()
