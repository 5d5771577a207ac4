"""The ops from several threads at once, on the same inputs: outside Python's lock."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

import polarfast.kernels  # noqa: F401  registers the ops

THREADS, TURNS = 4, 40


def in_threads(work: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What each thread found, all begun at one moment."""
    found: list[list[Tensor]] = []
    together = threading.Barrier(THREADS)

    def run() -> None:
        together.wait()
        for _ in range(TURNS):
            found.append(work())

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ops_in_several_threads():
    weight, index = torch.rand(64, 48, 3, 3), torch.arange(0, 48, 3)
    kept, constant = torch.rand(4, 16, 9, 9), torch.rand(48)
    norm = [torch.rand(16) for _ in range(4)]
    ops = torch.ops.polarfast

    def work() -> list[Tensor]:
        return [
            ops.gather_channels(weight, index, index),
            ops.put_back(kept, index, constant),
            ops.put_back_norm(kept, index, constant, *norm, 1e-5),
        ]

    wanted = work()
    found = in_threads(work)
    assert len(found) == THREADS * TURNS
    for each in found:
        assert all(torch.equal(a, b) for a, b in zip(each, wanted, strict=True))
