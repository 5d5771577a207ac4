"""Valley thresholds: numpy.histogram count for count, and the paper's rule written out again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import BACKENDS, device_of, table_of
from support.oracles import numpy_histogram

from polarfast.kernels.valley import valley
from polarfast.kernels.valley_ref import valley_ref

EDGES = [(torch.tensor(i, dtype=torch.float64) * 0.01).float() for i in range(101)]


def neighbourhood(edge: torch.Tensor) -> list[float]:
    """An edge and the float32 numbers next to it."""
    down = torch.nextafter(edge, torch.tensor(-1.0))
    up = torch.nextafter(edge, torch.tensor(2.0))
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


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(near_edges | anything, min_size=1, max_size=40), min_size=1, max_size=3)
)
def test_counts_are_numpys_and_the_threshold_follows(backend, rows):
    pytest.importorskip("numpy")
    params = [torch.nn.Parameter(torch.tensor(row, device=device_of(backend))) for row in rows]
    summary, counts = table_of(params, backend).valley()
    for param, (threshold, kept, nonfinite), found in zip(
        params, summary.tolist(), counts.tolist(), strict=True
    ):
        assert found == numpy_histogram(param)
        assert same(threshold, rule(found))
        assert kept == (param.numel() if math.isnan(threshold) else (param > threshold).sum())
        assert nonfinite == (~param.isfinite()).sum()


def test_every_edge_and_its_neighbours_fall_as_in_numpy():
    pytest.importorskip("numpy")
    gamma = torch.tensor([x for edge in EDGES for x in neighbourhood(edge)])
    assert valley([gamma])[1][0].tolist() == numpy_histogram(gamma)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_counted_as_float32(dtype):
    gamma = torch.rand(2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(valley([gamma])[1], valley([gamma.float()])[1])


def test_unpolarized_layer_gets_a_hundredth_and_loses_nothing():
    gamma = torch.full((64,), 0.5) + torch.linspace(-0.03, 0.03, 64)
    summary, _ = valley([gamma])
    assert summary[0].tolist() == [float(EDGES[1]), 64, 0]


def test_layer_without_a_valley_keeps_all():
    """Counts that rise at first and never stop rising but in the last bin."""
    gamma = torch.cat([torch.full((i + 1,), i / 100 + 0.005) for i in range(100)])
    threshold, kept, _ = valley([gamma])[0][0].tolist()
    assert math.isnan(threshold) and kept == gamma.numel()


def test_layer_that_would_lose_everything_says_so():
    threshold, kept, _ = valley([torch.zeros(8)])[0][0].tolist()
    assert threshold == float(EDGES[1]) and kept == 0


def test_reference_and_op_agree():
    generator = torch.Generator().manual_seed(0)
    gammas = [torch.rand(n, generator=generator) ** 3 * 1.2 - 0.1 for n in (1, 300, 5000)]
    gammas[1][7] = math.nan
    for got, want in zip(valley(gammas), valley_ref(gammas), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_opcheck():
    torch.library.opcheck(torch.ops.polarfast.valley.default, ([torch.rand(9), torch.rand(200)],))


def test_compiles_without_a_graph_break():
    gammas = [torch.rand(9), torch.rand(200)]
    compiled = torch.compile(lambda g: valley(g)[1] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gammas), valley(gammas)[1] + 1)
