"""CPU time of the ops beside what one would write without them; prints a table.

    python benchmarks/bench_ops.py [--threads N] [--repeats N]

The work: the 53 batch-norm weights (26,560 γ) of a ResNet-50, and the weight of its widest kind of
layer made twice as wide (2048×1024×3×3, half of its channels kept on both sides).

Expected before the first measurement (2 cores, AVX-512): one pass over 26,560 float32 is 106 KB
from L2, 3 µs; the step reads γ three times and the gradients once, 15 µs, and 53 rows of Python
objects, 15 µs: some 40 µs in all against 4 ms. The histogram is some 10 instructions for each γ,
30 µs against 2.5 ms. The gather moves 19 MB out of 38 MB read: as long as a copy or two of 19 MB.
It is timed twice: into memory that the process has used before, and into fresh memory (results are
kept), as when a model is slimmed; there the system's handing out of pages counts as well.

Figures are medians over `--repeats` rounds; every round times all forms of a job one after another,
so that what else the machine does falls on all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from polarfast.kernels import table_of
from polarfast.kernels.gather import gather_channels
from polarfast.kernels.table import Kind, Penalty, Table

LAM, T, UPPER = 1e-4, 1.2, 1.0


def resnet50_widths() -> list[int]:
    """Channels of the 53 batch norms of torchvision's ResNet-50: stem, blocks, their shortcuts."""
    widths = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            widths += [width, width, 4 * width] + [4 * width] * (block == 0)
    return widths


def make_scales() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    scales = []
    for width in resnet50_widths():
        scale = torch.nn.Parameter(torch.rand(width, generator=generator))
        scale.grad = torch.randn(width, generator=generator)
        scales.append(scale)
    return scales


def table_for(scales: list[torch.nn.Parameter]) -> Table:
    return table_of([str(i) for i in range(len(scales))], scales)


def fused(scales: list[torch.nn.Parameter]) -> Callable[[], None]:
    table = table_for(scales)

    def step() -> None:
        table.refresh()
        table.add_subgradient_(Penalty(Kind.POLARIZATION, LAM, T))
        table.clamp_(UPPER)

    return step


def autograd(scales: list[torch.nn.Parameter]) -> Callable[[], None]:
    """As the paper prints it: one term for each layer, backward, clamp."""
    n = sum(scale.numel() for scale in scales)

    def step() -> None:
        mean = torch.stack([scale.sum() for scale in scales]).sum() / n
        loss = sum((T * scale.abs() - (scale - mean).abs()).sum() for scale in scales)
        (LAM * loss).backward()
        with torch.no_grad():
            for scale in scales:
                scale.clamp_(0, UPPER)

    return step


def foreach(scales: list[torch.nn.Parameter]) -> Callable[[], None]:
    """By hand: concatenated, the subgradient written out, torch._foreach for the rest."""
    sizes = [scale.numel() for scale in scales]

    @torch.no_grad()
    def step() -> None:
        flat = torch.cat([scale.detach() for scale in scales])
        away = torch.sign(flat - flat.mean())
        added = (T * torch.sign(flat) - away + away.mean()).mul_(LAM)
        grads = [scale.grad for scale in scales]
        torch._foreach_add_(grads, list(added.split(sizes)))
        torch._foreach_clamp_min_(scales, 0.0)
        torch._foreach_clamp_max_(scales, UPPER)

    return step


def numpy_thresholds(scales: list[torch.nn.Parameter]) -> Callable[[], list[float | None]]:
    import numpy

    def threshold(values: Tensor) -> float | None:
        counts, edges = numpy.histogram(values.detach().numpy(), bins=100, range=(0, 1))
        d = numpy.diff(counts)
        for i in range(len(d) - 1):
            if d[i] <= 0 <= d[i + 1]:
                return float(edges[i + 1])
        return None

    return lambda: [threshold(scale) for scale in scales]


def medians(
    forms: dict[str, Callable[[], object]], repeats: int, seconds: float, keep: bool
) -> list[float]:
    """Median seconds per call of each form; each round of a form lasts about `seconds`."""
    calls = {}
    kept: list[object] = []
    for name, form in forms.items():
        form()
        begin = time.perf_counter()
        form()
        calls[name] = max(1, int(seconds / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                result = form()
                if keep:
                    kept.append(result)
            times[name].append((time.perf_counter() - begin) / calls[name])
    return [statistics.median(times[name]) for name in forms]


def report(
    title: str, forms: dict[str, Callable[[], object]], repeats: int, keep: bool = False
) -> None:
    """Prints each form's time, and how many times longer it takes than the first."""
    found = medians(forms, repeats, 0.0 if keep else 0.01, keep)
    print(f"\n{title}")
    for name, taken in zip(forms, found, strict=True):
        scaled = f"{taken * 1e6:10.1f} µs" if taken < 1e-3 else f"{taken * 1e3:10.2f} ms"
        print(f"  {name:<44}{scaled}{taken / found[0]:9.1f}×")


def bench_gather(kernel: int, repeats: int) -> None:
    weight = torch.randn(2048, 1024, kernel, kernel)
    generator = torch.Generator().manual_seed(0)
    out_index = torch.randperm(2048, generator=generator)[:1024].sort().values
    in_index = torch.randperm(1024, generator=generator)[:512].sort().values
    result = weight[out_index][:, in_index].contiguous()
    forms: dict[str, Callable[[], object]] = {
        "polarfast": lambda: gather_channels(weight, out_index, in_index),
        "w[o][:, i]": lambda: weight[out_index][:, in_index],
        "plain copy of a tensor of the result's size": result.clone,
    }
    title = f"Gather of half the channels of 2048×1024×{kernel}×{kernel}, float32"
    report(f"{title}, memory used before", forms, repeats)
    report(f"{title}, fresh memory", forms, repeats, keep=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of the ops beside other ways.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    widths = resnet50_widths()
    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.repeats} rounds")

    forms: dict[str, Callable[[], object]] = {
        "polarfast: refresh, subgradient, clamp": fused(make_scales()),
        "concatenate, subgradient by hand, _foreach": foreach(make_scales()),
        "autograd, one term for each layer": autograd(make_scales()),
    }
    report(f"γ work of a step: {len(widths)} layers, {sum(widths):,} γ", forms, args.repeats)

    scales = make_scales()
    forms = {"polarfast: Table.valley": table_for(scales).valley}
    try:
        forms["numpy.histogram and a scan for each layer"] = numpy_thresholds(scales)
    except ImportError:
        print("(numpy is not installed: no comparison)")
    report(f"Valley thresholds of {len(widths)} layers", forms, args.repeats)

    bench_gather(3, args.repeats)
    bench_gather(1, args.repeats)


if __name__ == "__main__":
    main()
