"""Valley thresholds: numpy.histogram count for count, and the paper's rule written out again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import BACKENDS, TOLERANCE, device_of, table_of
from support.oracles import numpy_histogram

EDGES = [(torch.tensor(i, dtype=torch.float64) * 0.01).float() for i in range(101)]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def neighbourhood(edge: torch.Tensor) -> list[float]:
    """An edge and the numbers of its dtype next to it."""
    down = torch.nextafter(edge, torch.tensor(-1.0, dtype=edge.dtype))
    up = torch.nextafter(edge, torch.tensor(2.0, dtype=edge.dtype))
    return [float(down), float(edge), float(up)]


near_edges = st.sampled_from([x for edge in EDGES for x in neighbourhood(edge)])
anything = st.floats(width=32) | st.floats(-0.125, 1.125, width=32)


def rule(counts: list[int]) -> float:
    """First i with d[i] <= 0 <= d[i+1], d = diff(counts): the left edge of bin i+1."""
    d = [b - a for a, b in zip(counts, counts[1:], strict=False)]
    for i in range(len(d) - 1):
        if d[i] <= 0 <= d[i + 1]:
            return float(EDGES[i + 1])
    return math.nan


def check(rows: list[torch.Tensor], backend: str) -> list[list[float]]:
    """Against numpy and the rule; the summary."""
    params = [torch.nn.Parameter(row.to(device_of(backend))) for row in rows]
    summary, counts = table_of(params, backend).valley()
    assert summary.dtype == torch.float64 and counts.dtype == torch.int64
    for param, (threshold, kept, nonfinite), found in zip(
        params, summary.tolist(), counts.tolist(), strict=True
    ):
        assert found == numpy_histogram(param)
        assert threshold == rule(found) or math.isnan(threshold) and math.isnan(rule(found))
        above = (param.double() > threshold).sum()
        assert kept == (param.numel() if math.isnan(threshold) else above)
        assert nonfinite == (~param.isfinite()).sum()
    return summary.tolist()


@pytest.fixture(autouse=True)
def numpy() -> None:
    pytest.importorskip("numpy")


@pytest.mark.slow
@every_backend
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(near_edges | anything, min_size=1, max_size=40), min_size=1, max_size=3)
)
def test_counts_are_numpys_and_the_threshold_follows(backend, rows):
    check([torch.tensor(row) for row in rows], backend)


@every_backend
@every_dtype
def test_every_edge_and_its_neighbours_fall_as_in_numpy(backend, dtype):
    # Not those of 0: Triton's interpreter reads a bfloat16 subnormal as 0.
    edges = [edge.to(dtype) for edge in EDGES[1:]]
    around = [x for edge in edges for x in neighbourhood(edge)]
    check([torch.tensor([0.0, *around], dtype=dtype), torch.stack(edges)], backend)


@pytest.mark.slow
@every_backend
@every_dtype
def test_layers_of_every_size_as_after_training(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in (1, 7, 300, 1024, 2500):
        near_zero = torch.rand(size, generator=generator) * 0.1
        stays = torch.rand(size, generator=generator) < 0.5
        rows.append(torch.where(stays, 1 - near_zero, near_zero).to(dtype))
    check(rows, backend)


@every_backend
def test_values_in_no_bin(backend):
    """NaN, infinities and what lies outside [0, 1] are not counted; −0 and 1 are."""
    odd = [math.nan, math.inf, -math.inf, -1e-30, 1.0000001, 1e30, -0.0, 0.0, 1.0, 0.5]
    summary = check([torch.tensor(odd), torch.full((4,), math.nan)], backend)
    assert [row[2] for row in summary] == [3, 4]


@every_backend
def test_unpolarized_layer_gets_a_hundredth_and_loses_nothing(backend):
    summary = check([torch.full((64,), 0.5) + torch.linspace(-0.03, 0.03, 64)], backend)
    assert summary == [[float(EDGES[1]), 64, 0]]


@every_backend
def test_layer_without_a_valley_keeps_all(backend):
    """Counts that rise from bin to bin: no difference is <= 0 before the last."""
    gamma = torch.cat([torch.full((i + 1,), i / 100 + 0.005) for i in range(100)])
    ((threshold, kept, _),) = check([gamma], backend)
    assert math.isnan(threshold) and kept == gamma.numel()


@every_backend
def test_layer_that_would_lose_everything_says_so(backend):
    assert check([torch.zeros(8)], backend) == [[float(EDGES[1]), 0, 0]]
