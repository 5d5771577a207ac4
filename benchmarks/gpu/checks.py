"""Stages b to f: does it compute the right thing? Each case is a row; a failing one stops no other.

The checks themselves are the tests' own (tests/support), on larger networks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import Row, attempted
from sizes import WIDTHS, cifar_resnet, factors, resnet50
from support.kernel_internals import triton_on_cpu
from support.real_loops import (
    LAM,
    LOOPS,
    SETTLED,
    TOLERANCE,
    T,
    WrittenOutSGD,
    follow,
    subgradients,
)
from support.replays import check_replays, on_internal_stream, on_warm_up_stream
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import polarfast as pf

ROOT = Path(__file__).parents[2]


# --- b, f: one step of the device beside the CPU and the oracle


def agreement(device: str, folder: Path) -> Iterator[Row]:
    title = "`pf.step` with SGD, three steps, beside the CPU and the oracle"
    for n, widths in WIDTHS.items():
        yield attempted(title, f"{n:,} γ", partial(_agree, device, widths))


def _agree(device: str, widths: list[int]) -> dict[str, Any]:
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    there, here = factors(widths, device), factors(widths, "cpu")
    reg, oracle = pf.Polarization(LAM, T), WrittenOutSGD(**options)
    optimizers = [SGD(scales.values(), **options) for scales in (there, here)]
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    apart, off = 0.0, 0.0
    for _ in range(3):
        gammas = [gamma.detach().double() for gamma in here.values()]
        grads = [gamma.grad.double() for gamma in here.values()]
        pushed = subgradients(gammas, LAM, T)
        moved = oracle.step(gammas, [g + s for g, s in zip(grads, pushed, strict=True)])
        with triton_on_cpu() if interpreted else nullcontext():
            pf.step(optimizers[0], there, reg)
        pf.step(optimizers[1], here, reg)
        for gamma, other, right in zip(there.values(), here.values(), moved, strict=True):
            value = gamma.detach().cpu().double()
            apart = max(apart, float((value - other.detach().double()).abs().max()))
            off = max(off, float((value - right.clamp(0, 1)).abs().max()))
    assert apart <= TOLERANCE, f"{apart:.2g} from the CPU"
    assert off <= TOLERANCE, f"{off:.2g} from the oracle"
    assert pf.thresholds(there) == pf.thresholds(here), "the thresholds are not the CPU's"
    return {"from the CPU": apart, "from the oracle": off}


# --- c: the tests that are marked gpu


class _Recorder:
    """Counts outcomes of tests as they end, and keeps the failures."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failures: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(report.longrepr) if crash is None else crash.message
            row = {"table": "failing tests", "row": report.nodeid, "cells": {}}
            self.failures.append({**row, "failed": message})


def marked_tests(device: str, folder: Path) -> Iterator[Row]:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    recorder = _Recorder()
    arguments = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    if pytest_has_xdist() and device == "cuda":
        arguments += ["-n", "8"]
    code = pytest.main([*arguments, *map(str, files)], plugins=[recorder])
    row: Row = {"table": "tests marked gpu", "row": "all", "cells": recorder.counts}
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        row["failed"] = f"pytest ended with {code!r}"
    elif device == "cuda" and not recorder.counts.get("passed"):
        row["failed"] = "no test ran"
    yield row
    yield from recorder.failures


def pytest_has_xdist() -> bool:
    try:
        import xdist  # noqa: F401
    except ImportError:
        return False
    return True


# --- d: real loops


def loops(device: str, folder: Path) -> Iterator[Row]:
    network, images, labels = _training(device)
    steps = 20 if device == "cuda" else 7
    title = f"loops of {steps} steps beside Eq. 2 and the optimizer written out in float64"
    for name, loop in LOOPS.items():
        if loop.gpu_only and device != "cuda":
            continue

        def work(loop: Any = loop) -> dict[str, Any]:
            found = follow(loop, network, images, labels, steps)
            settled = found.uploads[SETTLED:]
            if not loop.set_to_none and any(settled):
                raise AssertionError(f"addresses went to the device in settled steps: {settled}")
            return {
                "γ": found.factors,
                "largest error": found.largest_error,
                "skipped steps": found.skipped,
                "address uploads a settled step": sum(settled) / len(settled),
                "waits for the GPU": "none" if loop.unwaiting == "loop" else _held[loop.unwaiting],
            }

        yield attempted(title, name, work)


_held = {"pf.step": "none in pf.step", "nothing": "GradScaler's own"}


def _training(device: str) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = 64 if device == "cuda" else 16
    images = torch.randn(8, 3, size, size, generator=generator)
    labels = torch.randint(10, (8,), generator=generator)
    network = partial(resnet50, 10) if device == "cuda" else partial(cifar_resnet, 8)
    return network, images.to(device), labels.to(device)


# --- e: a step in a CUDA graph


def replays(device: str, folder: Path) -> Iterator[Row]:
    optimizers = {
        "SGD": partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
        "AdamW capturable": partial(AdamW, lr=1e-3, capturable=True),
    }
    streams = {"internal": on_internal_stream, "warm-up": on_warm_up_stream}
    _, images, labels = _training(device)
    for name, make in optimizers.items():
        for stream, record in streams.items():
            for set_to_none in (True, False):

                def work(record=record, make=make, set_to_none=set_to_none) -> dict[str, Any]:
                    network = partial(cifar_resnet, 20)
                    check_replays(record, make, network, images, labels, set_to_none=set_to_none)
                    return {"equal": "to the bit"}

                title = "ten replays of a captured training step beside ten eager ones"
                row = f"{name}, {stream} stream, set_to_none={set_to_none}"
                yield attempted(title, row, work)
