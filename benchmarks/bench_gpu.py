"""The γ work of a training step on a GPU, beside the autograd form and the `_foreach` form.

    python benchmarks/bench_gpu.py

Median time in µs of one call among many in a row (the slower of the host, which launches, and the
GPU), and of one replay of the same work from a CUDA graph (the GPU alone).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from polarfast.kernels import table_of
from polarfast.kernels.table import Kind, Penalty, SgdStep, Table

LAM, T = 1e-4, 1.2
Params = list[Tensor]

# Factors of each layer of ResNet-50: bn1 and bn2 of each block, as in the paper, and all BNs.
_BLOCKS = [(3, 64), (4, 128), (6, 256), (3, 512)]
REGULARIZED = [width for blocks, width in _BLOCKS for _ in range(2 * blocks)]
ALL = REGULARIZED + [4 * width for blocks, width in _BLOCKS for _ in range(blocks + 1)] + [64]


def autograd_form(params: Params) -> None:
    """Eq. 2 as printed, one term a layer, differentiated by autograd."""
    mean = torch.cat(params).mean()
    terms = [T * p.abs().sum() - (p - mean).abs().sum() for p in params]
    (LAM * torch.stack(terms).sum()).backward()
    with torch.no_grad():
        for p in params:
            p.clamp_(0, 1)


@torch.no_grad()
def foreach_form(params: Params) -> None:
    """Subgradient by hand on the concatenation, handed back with `_foreach` ops."""
    gammas = torch.cat(params)
    side = torch.sign(gammas - gammas.mean())
    subgradient = LAM * (T * torch.sign(gammas) - side + side.mean())
    grads = [p.grad for p in params if p.grad is not None]
    torch._foreach_add_(grads, subgradient.split([p.numel() for p in params]))
    torch._foreach_clamp_min_(params, 0)
    torch._foreach_clamp_max_(params, 1)


def table_for(params: Params) -> Table:
    return table_of([str(i) for i in range(len(params))], params)


def polarfast_form(params: Params) -> Callable[[], None]:
    table = table_for(params)

    def step() -> None:
        table.refresh()
        table.add_subgradient_(Penalty(Kind.POLARIZATION, LAM, T))
        table.clamp_(1.0)

    return step


def fused_form(params: Params) -> Callable[[], None]:
    """Subgradient, SGD with momentum and weight decay, and clamp."""
    table = table_for(params)
    state = {p: {"momentum_buffer": torch.zeros_like(p)} for p in params}

    def step() -> None:
        table.refresh(state)
        table.sgd_step_(
            Penalty(Kind.POLARIZATION, LAM, T),
            SgdStep(lr=0.1, momentum=0.9, weight_decay=1e-4, upper=1.0),
        )

    return step


def foreach_then_sgd(params: Params) -> Callable[[], None]:
    """The same work without the fusion: the `_foreach` form, then torch's own fused SGD."""
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        foreach_form(params)
        sgd.step()

    return step


def valley_form(params: Params) -> Callable[[], None]:
    table = table_for(params)

    def thresholds() -> None:
        table.valley()

    return thresholds


def histc_form(params: Params) -> None:
    """Counts alone, layer by layer."""
    for p in params:
        torch.histc(p, bins=100, min=0, max=1)


FORMS: dict[str, Callable[[Params], Callable[[], None]]] = {
    "subgradient + clamp: autograd": lambda params: lambda: autograd_form(params),
    "subgradient + clamp: _foreach": lambda params: lambda: foreach_form(params),
    "subgradient + clamp: polarfast": polarfast_form,
    "with SGD: _foreach + fused SGD": foreach_then_sgd,
    "with SGD: polarfast": fused_form,
    "thresholds: torch.histc, counts only": lambda params: lambda: histc_form(params),
    "thresholds: polarfast": valley_form,
}


def factors(sizes: list[int]) -> Params:
    params: Params = [torch.nn.Parameter(torch.rand(n, device="cuda")) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def median_us(work: Callable[[], None], calls: int = 50, rounds: int = 21) -> float:
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[1:])  # the first round compiles


def replayed_us(work: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return median_us(graph.replay)


def main() -> int:
    if not torch.cuda.is_available():
        print("bench_gpu.py times GPU kernels, and torch sees no GPU here; nothing was measured.")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for title, sizes in (("bn1 and bn2", REGULARIZED), ("all BNs", ALL)):
        print(f"\nResNet-50, {title}: {sum(sizes):,} factors in {len(sizes)} layers")
        print(f"{'':38}{'call, µs':>12}{'graph replay, µs':>18}")
        for name, form in FORMS.items():
            call = median_us(form(factors(sizes)))
            replay = replayed_us(form(factors(sizes)))
            print(f"{name:38}{call:12.1f}{replay:18.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
