"""All that the loops and GPU benchmarks know of the inside of `polarfast/kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from polarfast.kernels import table_of
from polarfast.kernels.table import Kind, Penalty, SgdStep, Table
from polarfast.stepping import binding


@contextmanager
def counted_uploads() -> Iterator[list[int]]:
    """A list of one number: how often a table has sent addresses to its device in this block."""
    from polarfast.kernels.triton_table import TritonTable

    count, upload = [0], TritonTable._upload

    def counting(table: TritonTable, host: Tensor) -> object:
        count[0] += 1
        return upload(table, host)

    with mock.patch.object(TritonTable, "_upload", counting):
        yield count


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """`pf.step` of γ on the CPU goes through the Triton kernels: for Triton's interpreter."""
    from polarfast.kernels.triton_table import TritonTable

    with mock.patch.object(binding, "table_of", TritonTable):
        yield


def sgd_kernels(params: Sequence[Tensor], lam: float, t: float) -> Callable[[], None]:
    """The fused step of SGD without the checks of `pf.step` around it."""
    table = _table(params)
    state = {param: {"momentum_buffer": torch.zeros_like(param)} for param in params}
    penalty = Penalty(Kind.POLARIZATION, lam, t)
    sgd = SgdStep(lr=0.1, momentum=0.9, weight_decay=1e-4, upper=1.0)

    def work() -> None:
        table.refresh(state)
        table.sgd_step_(penalty, sgd)

    return work


def valley_kernel(params: Sequence[Tensor]) -> Callable[[], None]:
    """Histograms and valleys of all layers, left on the device."""
    table = _table(params)

    def work() -> None:
        table.valley()

    return work


def _table(params: Sequence[Tensor]) -> Table:
    return table_of([str(i) for i in range(len(params))], params)
