"""Stages g and h: what the γ work of a step costs by itself, in a step, and in a training.

Nothing else may run beside it. A figure is the median of 21 rounds and their quartiles. The host's
time is that of issuing calls, without waiting for them; a call "in a row" is the slower of the host
and the device; in a graph of 100 calls the host has no part. (A graph of one call would time the
launch of graphs.)
"""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rows import Row, attempted, spread
from sizes import WIDTHS, cifar_resnet, factors, resnet50
from support.kernel_internals import sgd_kernels, valley_kernel
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import SGD, AdamW
from torch.profiler import ProfilerActivity, profile

import polarfast as pf

LAM, T = 1e-4, 1.2
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
Work = Callable[[], Any]


class Clock:
    """How often work is repeated, and where.

    Attributes:
        calls: in a round: few enough for the device's queue to take them without waiting.
    """

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.device = device
        self.rounds, self.calls, self.captured = (21, 20, 100) if self.gpu else (3, 2, 0)
        self.network = "ResNet-50" if self.gpu else "CIFAR ResNet-8"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def calls_in_a_row(self, *works: Work, calls: int = 0) -> list[tuple[list[float], list[float]]]:
        """For each work µs of a call, issued and done; all of them take turns."""
        calls = calls or self.calls
        times: list[tuple[list[float], list[float]]] = [([], []) for _ in works]
        for number in range(self.rounds + 2):
            for work, (issued, done) in zip(works, times, strict=True):
                self.wait()
                start = time.perf_counter()
                for _ in range(calls):
                    work()
                middle = time.perf_counter()
                self.wait()
                if number >= 2:  # the first compile and warm up
                    issued.append((middle - start) / calls * 1e6)
                    done.append((time.perf_counter() - start) / calls * 1e6)
        return times

    def in_a_graph(self, work: Work) -> list[float]:
        """µs of a call among the 100 of one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.captured):
                work()
        ((_, done),) = self.calls_in_a_row(graph.replay, calls=1)
        return [each / self.captured for each in done]


def timings(device: str, folder: Path) -> Iterator[Row]:
    clock = Clock(device)
    yield from gamma_work(clock)
    for part in (beside_plain_steps, looks, training_step, slim_latency, epoch, latency_asked):
        try:
            yield from part(clock)
        except Exception as error:  # reported, and the next one goes on
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"
            yield {
                "table": "parts that failed",
                "row": part.__name__,
                "cells": {},
                "failed": failed,
            }


# --- the γ alone


@triton.jit
def _nothing():
    """What any launch costs."""


def empty_kernel(scales: pf.ScalingFactors) -> Work:
    return lambda: _nothing[(1,)]()


def by_hand(scales: pf.ScalingFactors) -> Work:
    """Subgradient on the concatenation, handed back with `_foreach` ops, and clamp."""
    params = list(scales.values())
    sizes = [p.numel() for p in params]

    @torch.no_grad()
    def work() -> None:
        gammas = torch.cat(params)
        side = torch.sign(gammas - gammas.mean())
        subgradient = LAM * (T * torch.sign(gammas) - side + side.mean())
        torch._foreach_add_([p.grad for p in params], subgradient.split(sizes))
        torch._foreach_clamp_min_(params, 0)
        torch._foreach_clamp_max_(params, 1)

    return work


def by_hand_with_sgd(scales: pf.ScalingFactors) -> Work:
    before, optimizer = by_hand(scales), SGD(scales.values(), **SGD_OPTIONS, fused=True)

    def work() -> None:
        before()
        optimizer.step()

    return work


def ours(scales: pf.ScalingFactors) -> Work:
    optimizer, reg = SGD(scales.values(), **SGD_OPTIONS), pf.Polarization(LAM, T)
    return lambda: pf.step(optimizer, scales, reg)


def ours_moved(scales: pf.ScalingFactors) -> Work:
    """Every gradient is elsewhere at each step, as `zero_grad(set_to_none=True)` may leave them."""
    params, work = list(scales.values()), ours(scales)
    grads = [[p.grad for p in params], [torch.clone(p.grad) for p in params]]

    def moved() -> None:
        grads.reverse()
        for param, grad in zip(params, grads[0], strict=True):
            param.grad = grad
        work()

    return moved


def histc(scales: pf.ScalingFactors) -> Work:
    """Counts alone, layer by layer."""
    params = [p.detach() for p in scales.values()]
    return lambda: [torch.histc(p, bins=100, min=0, max=1) for p in params]


def kernels_alone(scales: pf.ScalingFactors) -> Work:
    return sgd_kernels(list(scales.values()), LAM, T)


def valleys_alone(scales: pf.ScalingFactors) -> Work:
    return valley_kernel(list(scales.values()))


def thresholds_read(scales: pf.ScalingFactors) -> Work:
    return lambda: pf.thresholds(scales)


FORMS: dict[str, Callable[[pf.ScalingFactors], Work]] = {
    "an empty Triton kernel": empty_kernel,
    "subgradient + clamp: `_foreach` by hand": by_hand,
    "with SGD: `_foreach` by hand + fused SGD": by_hand_with_sgd,
    "with SGD: `pf.step`": ours,
    "with SGD: `pf.step`, moved gradients": ours_moved,
    "with SGD: our kernels without `pf.step`": kernels_alone,
    "thresholds: `torch.histc`, counts only": histc,
    "thresholds: our kernel": valleys_alone,
    "thresholds: `pf.thresholds`, read by the host": thresholds_read,
}
#: Work of which the host is a part.
UNCAPTURABLE = (ours_moved, thresholds_read)


def gamma_work(clock: Clock) -> Iterator[Row]:
    launchable = clock.gpu or os.environ.get("TRITON_INTERPRET") == "1"
    for n, widths in WIDTHS.items() if clock.gpu else [(2_016, WIDTHS[2_016])]:
        for name, form in FORMS.items():
            if launchable or form is not empty_kernel:
                timed = partial(_timed, clock, form, widths)
                yield attempted(f"γ work of a step, {n:,} γ", name, timed)


def _timed(
    clock: Clock, form: Callable[[pf.ScalingFactors], Work], widths: list[int]
) -> dict[str, Any]:
    ((issued, done),) = clock.calls_in_a_row(form(factors(widths, clock.device)))
    cells: dict[str, Any] = {"host, µs": spread(issued), "in a row, µs": spread(done)}
    if clock.captured and form not in UNCAPTURABLE:
        captured = clock.in_a_graph(form(factors(widths, clock.device)))
        cells["in a graph of 100, µs"] = spread(captured)
    return cells


# --- all parameters of a network


def resnet(clock: Clock, parted: bool = True) -> tuple[nn.Module, pf.ScalingFactors, Tensor]:
    """The clock's network, its factors, an example. γ are all over [0, 1], or
    where a training starts.
    """
    torch.manual_seed(0)
    network = resnet50() if clock.gpu else cifar_resnet(8)
    model = network.to(clock.device)
    side = 224 if clock.gpu else 16
    example = torch.randn(1, 3, side, side, device=clock.device)
    scales = pf.scaling_factors(model, example, residual="expand")
    if parted:
        with torch.no_grad():
            for gamma in scales.values():
                gamma.uniform_(0.01, 1)
    else:
        pf.init_scales(scales, 0.5)
    return model, scales, example


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: SGD(p, 1e-6, 0.9),
    "SGD foreach": lambda p: SGD(p, 1e-6, 0.9, foreach=True),
    "SGD fused": lambda p: SGD(p, 1e-6, 0.9, fused=True),
    "AdamW fused": lambda p: AdamW(p, 1e-6, fused=True),
}


def beside_plain_steps(clock: Clock) -> Iterator[Row]:
    model, scales, _ = resnet(clock)
    reg = pf.Polarization(LAM, T)
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    for name, make in OPTIMIZERS.items():
        optimizer = make(model.parameters())

        def regularized(optimizer=optimizer) -> None:
            pf.step(optimizer, scales, reg)

        plain, with_ours = clock.calls_in_a_row(optimizer.step, regularized, calls=2)
        cells: dict[str, Any] = {}
        for title, at in (("host, µs", 0), ("in a row, µs", 1)):
            cells[f"plain: {title}"] = spread(plain[at])
            cells[f"pf.step: {title}"] = spread(with_ours[at])
            added = [b - a for a, b in zip(plain[at], with_ours[at], strict=True)]
            cells[f"difference: {title}"] = spread(added)
        yield {
            "table": f"`pf.step` beside `optimizer.step`, all of the network, {scales.numel():,} γ",
            "row": name,
            "cells": cells,
        }


def looks(clock: Clock) -> Iterator[Row]:
    model, scales, example = resnet(clock)
    optimizer = SGD(model.parameters(), 1e-6, 0.9)
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    regularizers = {
        "Polarization": pf.Polarization(LAM, T),
        "FlopsTarget that looks every tenth step": pf.FlopsTarget(model, example, scales, cut=0.5),
        "FlopsTarget that looks at every step": pf.FlopsTarget(
            model, example, scales, cut=0.5, every=1
        ),
    }
    works = [partial(pf.step, optimizer, scales, reg) for reg in regularizers.values()]
    for name, (issued, done) in zip(
        regularizers, clock.calls_in_a_row(*works, calls=10 if clock.gpu else 2), strict=True
    ):
        cells = {"host, µs": spread(issued), "in a row, µs": spread(done)}
        yield {"table": "a look of FlopsTarget", "row": name, "cells": cells}


# --- training


def trained(
    clock: Clock, model: nn.Module, optimizer: Any, take: Callable[..., Any], scaler: Any
) -> Callable[[Tensor, Tensor], None]:
    def work(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(clock.device, torch.float16, enabled=scaler.is_enabled()):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        take()
        scaler.update()

    return work


def training_step(clock: Clock) -> Iterator[Row]:
    """ResNet-50 at batch 256, with and without polarfast in turns."""
    model, scales, example = resnet(clock, parted=False)
    layout = torch.channels_last
    model = model.to(memory_format=layout)
    batch = 256 if clock.gpu else 4
    images = torch.randn(batch, *example.shape[1:], device=clock.device).to(memory_format=layout)
    labels = torch.randint(10, (batch,), device=clock.device)
    optimizer = SGD(model.parameters(), 1e-3, 0.9, fused=True)
    reg = pf.Polarization(LAM, T)
    scaler = torch.amp.GradScaler(clock.device, enabled=clock.gpu)
    takes: dict[str, Work] = {
        "without polarfast": lambda: scaler.step(optimizer),
        "with pf.step": lambda: pf.step(optimizer, scales, reg, scaler=scaler),
    }
    works = [
        partial(trained(clock, model, optimizer, take, scaler), images, labels)
        for take in takes.values()
    ]
    times = clock.calls_in_a_row(*works, calls=1)
    for name, (_, done) in zip(takes, times, strict=True):
        yield {
            "table": f"a training step of {clock.network}, AMP, channels_last, batch {batch}",
            "row": name,
            "cells": {
                "ms": spread(done, 1e3),
                "images/s": round(1e6 * batch / statistics.median(done)),
            },
        }


def epoch(clock: Clock) -> Iterator[Row]:
    """An epoch of the recipe cifar10-resnet56 on random images, with and without polarfast.

    Both take turns of 23 steps, so that what else the machine does falls on both.
    """
    torch.manual_seed(0)
    count, depth, turn = (50_000, 56, 23) if clock.gpu else (512, 8, 2)
    images = torch.randn(count, 3, 32, 32, device=clock.device)
    labels = torch.randint(10, (count,), device=clock.device)
    model = cifar_resnet(depth).to(clock.device)
    scales = pf.scaling_factors(model, images[:1], residual="expand")
    pf.init_scales(scales, 0.5)
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    reg = pf.Polarization(5e-5, 1.4, clamp="all")
    scaler = torch.amp.GradScaler(clock.device, enabled=False)
    takes: dict[str, Work] = {
        "without polarfast": optimizer.step,
        "with pf.step": lambda: pf.step(optimizer, scales, reg),
    }
    works = [trained(clock, model, optimizer, take, scaler) for take in takes.values()]
    blocks = torch.randperm(count).split(128 * turn)
    for work in works:
        work(images[:128], labels[:128])
    seconds: list[list[float]] = [[], []]
    for block in blocks:
        for work, taken in zip(works, seconds, strict=True):
            batches = [batch.to(clock.device) for batch in block.split(128)]
            clock.wait()
            start = time.perf_counter()
            for batch in batches:
                work(images[batch], labels[batch])
            clock.wait()
            taken.append((time.perf_counter() - start) / len(batches))
    steps = -(-count // 128)
    for name, taken in zip(takes, seconds, strict=True):
        yield {
            "table": f"an epoch of CIFAR ResNet-{depth}, batch 128, {steps} steps",
            "row": name,
            "cells": {"s": steps * statistics.median(taken), "ms a step": spread(taken, 1e-3)},
        }


def latency_asked(clock: Clock) -> Iterator[Row]:
    """Shares of the time asked for, as a latency table predicts them and as they come out."""
    model, scales, example = resnet(clock)
    images = torch.randn(32 if clock.gpu else 2, *example.shape[1:], device=clock.device)
    table = pf.LatencyTable.measure(
        model,
        images,
        dtype=torch.float16 if clock.gpu else torch.float32,
        memory_format=torch.channels_last,
        seconds=10.0 if clock.gpu else 0.5,
    )
    _, largest = pf.reachable(model, images, scales, latency=table).latency or (0.0, 0.0)
    most = max(largest, 0.0)  # nothing is gained on a network as small as the CPU's
    for part in (0.4, 0.7):
        asked = partial(_asked, model, images, scales, table, part * most)
        title = f"share of the time asked for, {clock.network}, batch {len(images)}"
        yield attempted(title, f"−{100 * part * most:.0f} %", asked)


def _asked(
    model: nn.Module, images: Tensor, scales: pf.ScalingFactors, table: pf.LatencyTable, cut: float
) -> dict[str, Any]:
    plan = pf.plan(model, images, scales, cut=cut, of="latency", latency=table)
    found = plan.latency
    assert found is not None and found.cut_measured is not None and found.error is not None
    return {
        "predicted %": round(100 * found.cut, 1),
        "measured %": round(100 * found.cut_measured, 1),
        "prediction off %": round(100 * found.error, 1),
        "MACs %": round(100 * plan.flops_reduction, 1),
    }


def slim_latency(clock: Clock) -> Iterator[Row]:
    """The whole network and slim ones at 54 % fewer MACs, half precision, channels_last."""
    networks: dict[str, nn.Module] = {}
    for residual in ("expand", "couple"):
        model, _, example = resnet(clock)
        scales = pf.scaling_factors(model, example, residual=residual)
        plan = pf.plan(model, example, scales, cut=0.54, round_to=8 if clock.gpu else 1)
        networks.setdefault("whole", model)
        slim = pf.slim(model, plan)
        networks[f"slim, {residual}, −{100 * plan.flops_reduction:.1f} % MACs"] = slim
    dtype = torch.float16 if clock.gpu else torch.float32
    for network in networks.values():
        network.eval().to(dtype=dtype, memory_format=torch.channels_last)
    for batch in (1, 32, 256) if clock.gpu else (1, 2):
        images = torch.randn(batch, *example.shape[1:], device=clock.device)
        images = images.to(dtype=dtype, memory_format=torch.channels_last)

        works = [partial(inferred, network, images) for network in networks.values()]
        eager = clock.calls_in_a_row(*works, calls=2)
        for name, work, (_, done) in zip(networks, works, eager, strict=True):
            cells: dict[str, Any] = {"eager, ms": spread(done, 1e3)}
            if clock.gpu:
                cells["in a graph, ms"] = spread(replayed(clock, work), 1e3)
            yield {
                "table": f"latency of {clock.network}, batch {batch}",
                "row": name,
                "cells": cells,
            }


@torch.inference_mode()
def inferred(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def replayed(clock: Clock, work: Work) -> list[float]:
    """µs of one replay of a CUDA graph that holds one call."""
    once = Clock(clock.device)
    once.captured = 1
    return once.in_a_graph(work)


# --- h: a trace


def trace(device: str, folder: Path) -> Iterator[Row]:
    """Three steps of the whole network; the file is for chrome://tracing or Perfetto."""
    clock = Clock(device)
    model, scales, _ = resnet(clock)
    optimizer, reg = SGD(model.parameters(), 1e-6, 0.9, fused=True), pf.Polarization(LAM, T)
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    for _ in range(3):
        pf.step(optimizer, scales, reg)
    clock.wait()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * clock.gpu
    with profile(activities=activities) as profiler:
        for _ in range(3):
            pf.step(optimizer, scales, reg)
        clock.wait()
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    events = profiler.key_averages()
    if clock.gpu:
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    for event in sorted(
        events, key=lambda e: -max(e.self_device_time_total, e.self_cpu_time_total)
    ):
        yield {
            "table": f"three `pf.step` of the whole network, {scales.numel():,} γ",
            "row": event.key[:80],
            "cells": {
                "calls": event.count,
                "device, µs": round(event.self_device_time_total, 1),
                "host, µs": round(event.self_cpu_time_total, 1),
            },
        }
