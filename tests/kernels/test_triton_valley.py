"""The Triton valley kernel against numpy.histogram and the rule of the paper's Sec. 3.3."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

np = pytest.importorskip("numpy")
pytest.importorskip("triton")

from support.triton_harness import DEVICE, table_of  # noqa: E402

from polarfast.kernels.valley_triton import valley  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def oracle(gamma):
    """(threshold or NaN, kept, not finite, counts) of one row, the rule read aloud."""
    x = gamma.float().cpu().numpy()
    counts, edges = np.histogram(x, bins=100, range=(0, 1))
    d = np.diff(counts)
    threshold = next((edges[i + 1] for i in range(98) if d[i] <= 0 <= d[i + 1]), math.nan)
    kept = x.size if math.isnan(threshold) else int((gamma.double() > threshold).sum())
    return float(threshold), float(kept), float((~np.isfinite(x)).sum()), counts


def check(gammas):
    summary, counts = valley(table_of(gammas, [None] * len(gammas)))
    assert summary.dtype == torch.float64 and counts.dtype == torch.int64
    for row, gamma in enumerate(gammas):
        *want, histogram = oracle(gamma)
        assert counts[row].tolist() == histogram.tolist()
        np.testing.assert_equal(summary[row].tolist(), want)


def polarized(n, seed):
    """Factors near 0 and near 1, as after sparsity training."""
    generator = torch.Generator().manual_seed(seed)
    near_zero = torch.rand(n, generator=generator) * 0.1
    return torch.where(torch.rand(n, generator=generator) < 0.5, near_zero, 1 - near_zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_size(dtype):
    sizes = [1, 7, 64, 1024, 2500]
    check([polarized(n, seed).to(dtype).to(DEVICE) for seed, n in enumerate(sizes)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_edge_and_its_neighbours(dtype):
    edges = torch.from_numpy(np.histogram_bin_edges(np.zeros(1, np.float32), 100, (0, 1)))
    edges = edges.to(dtype)
    # Not those of 0: the interpreter reads a bfloat16 subnormal as 0.
    around = [edges[1:].nextafter(torch.tensor(side, dtype=dtype)) for side in (-1.0, 2.0)]
    check([torch.cat([edges, *around]).to(DEVICE), edges.to(DEVICE)])


def test_values_in_no_bin():
    """NaN, infinities and what lies outside [0, 1] are not counted; −0 and 1 are."""
    odd = [math.nan, math.inf, -math.inf, -1e-30, 1.0000001, 1e30, -0.0, 0.0, 1.0, 0.5]
    check([torch.tensor(odd, device=DEVICE), torch.full((4,), math.nan, device=DEVICE)])


def test_an_unpolarized_layer_loses_nothing():
    summary, _ = valley(table_of([torch.full((64,), 0.5, device=DEVICE)], [None]))
    assert summary[0].tolist() == [float(np.float32(0.01)), 64.0, 0.0]


def test_a_layer_without_valley_keeps_all():
    """Counts that rise from bin to bin: no difference is ≤ 0 before the last."""
    rising = torch.cat([torch.full((i + 1,), i / 100 + 0.005) for i in range(100)]).to(DEVICE)
    summary, _ = valley(table_of([rising], [None]))
    assert math.isnan(summary[0, 0]) and summary[0, 1] == rising.numel()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.floats(-0.125, 1.125, width=32) | st.integers(0, 100).map(lambda i: i / 100)),
        min_size=1,
        max_size=4,
    )
)
def test_any_row(rows):
    check([torch.tensor(row, dtype=torch.float32, device=DEVICE) for row in rows])
