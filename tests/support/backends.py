"""The tables of scaling factors, by backend, for tests that hold for each of them."""

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polarfast.kernels import EagerTable, ScaleTable, table_type
from polarfast.kernels.table import Table

from .oracles import centers

_needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# Without a GPU the Triton kernels run in Triton's interpreter (conftest.py).
BACKENDS = [pytest.param("cpu"), pytest.param("eager"), pytest.param("triton", marks=_needs_triton)]
#: The same, and the launches with which Triton takes the mean of more γ than these tests have.
WITH_ALL_LAUNCHES = [*BACKENDS, pytest.param("triton, 3 launches", marks=_needs_triton)]

# For values of size one that went through one rounding to the dtype, and float32 arithmetic.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-13,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def device_of(backend: str) -> str:
    return "cuda" if backend.startswith("triton") and torch.cuda.is_available() else "cpu"


def random_gammas(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> list[torch.nn.Parameter]:
    """γ in [-0.2, 1], some of them exactly 0, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for size in sizes:
        values = torch.rand(size, generator=generator, dtype=torch.float64) * 1.2 - 0.2
        values = torch.where(values.abs() < 0.02, 0.0, values)
        param = torch.nn.Parameter(values.to(device, dtype))
        param.grad = torch.randn(size, generator=generator).to(device, dtype)
        params.append(param)
    return params


def table_of(
    params: Sequence[Tensor],
    backend: str,
    weights: Sequence[float] | None = None,
    tilts: Sequence[float] | None = None,
) -> Table:
    names = [f"bn{i}.weight" for i in range(len(params))]
    table = kind_of(backend)(names, params, weights, tilts)
    table.centers = centers(len(params))
    return table


def kind_of(backend: str) -> type[Table]:
    if not backend.startswith("triton"):
        return {"cpu": ScaleTable, "eager": EagerTable}[backend]
    kind = table_type("cuda")
    return kind if backend == "triton" else type(kind.__name__, (kind,), {"FLAT_SIZE": 0})


def bits(tensor: Tensor) -> bytes:
    """For comparison to the last bit, the sign of zero included."""
    return bytes(tensor.detach().cpu().contiguous().view(torch.uint8).tolist())


def assert_close(got, want, dtype=torch.float32):
    """Tensor by tensor, to the tolerance of the dtype in which the kernel computed."""
    tolerance = TOLERANCE[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.detach().double().cpu(), b.detach().double().cpu(), rtol=tolerance, atol=tolerance
        )
