"""The backends that the pointer table runs on, for tests that hold for each of them."""

import importlib.util

import pytest
import torch
from torch import Tensor

from polarfast.kernels.table import ScaleTable

# Without a GPU the Triton kernels run in Triton's interpreter (conftest.py).
BACKENDS = [
    "cpu",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("triton") is None, reason="Triton is not installed"
        ),
    ),
]

# For values of size one that went through one rounding to the dtype, and float32 arithmetic.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-13,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def random_gammas(
    sizes: list[int], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
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
    params: list[torch.nn.Parameter], backend: str, weights: list[float] | None = None
) -> ScaleTable:
    return ScaleTable(
        [f"bn{i}.weight" for i in range(len(params))], params, weights, backend=backend
    )


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
