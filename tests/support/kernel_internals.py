"""All that the loops and GPU benchmarks know of the inside of `polarfast/kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from polarfast.kernels.device_table import DeviceTable
from polarfast.kernels.polarize_ref import KIND_POLARIZATION
from polarfast.kernels.table import ScaleTable
from polarfast.stepping import binding


@contextmanager
def counted_uploads() -> Iterator[list[int]]:
    """A list of one number: how often a table has sent addresses to its device in this block."""
    count, upload = [0], DeviceTable.set_addresses

    def counting(table: DeviceTable, addresses: list[list[int]]) -> None:
        count[0] += 1
        upload(table, addresses)

    with mock.patch.object(DeviceTable, "set_addresses", counting):
        yield count


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """`pf.step` of γ on the CPU goes through the Triton kernels: for Triton's interpreter."""
    with mock.patch.object(binding, "ScaleTable", _TritonTable):
        yield


class _TritonTable(ScaleTable):
    __init__ = functools.partialmethod(ScaleTable.__init__, backend="triton")


def sgd_kernels(params: Sequence[Tensor], lam: float, t: float) -> Callable[[], None]:
    """The fused step of SGD without the hooks and checks of `pf.step` around it."""
    table = _table(params)
    state = {param: {"momentum_buffer": torch.zeros_like(param)} for param in params}
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "upper": 1.0}

    def work() -> None:
        table.refresh(state)
        table.sgd_step_(KIND_POLARIZATION, lam, t, False, **options)

    return work


def valley_kernel(params: Sequence[Tensor]) -> Callable[[], None]:
    """Histograms and valleys of all layers, left on the device."""
    table = _table(params)

    def work() -> None:
        table.valley()

    return work


def _table(params: Sequence[Tensor]) -> ScaleTable:
    return ScaleTable([str(i) for i in range(len(params))], params)
