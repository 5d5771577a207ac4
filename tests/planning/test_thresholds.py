"""Thresholds: the valley rule restated in Python, fixed and percentile by counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polarfast.errors import ArgumentError, ScalingFactorError, ThresholdError
from polarfast.planning.thresholds import Ranking, thresholds
from polarfast.scaling.factors import ScalingFactors


def _scales(
    *layers: list[float] | torch.Tensor, dtype: torch.dtype = torch.float32
) -> ScalingFactors:
    return ScalingFactors(
        {
            f"g{i}": nn.Parameter(torch.as_tensor(values, dtype=torch.float64).to(dtype))
            for i, values in enumerate(layers)
        }
    )


def _edges() -> list[float]:
    """What numpy.histogram(γ_float32, bins=100, range=(0, 1)) takes as edges."""
    return [torch.tensor(i * 0.01).float().item() for i in range(100)] + [1.0]


def _valley(values: list[float]) -> float | None:
    """Sec. 3.3, one layer at a time and one γ at a time."""
    edges, counts = _edges(), [0] * 100
    for value in values:
        for i in range(100):
            if edges[i] <= value < edges[i + 1] or (i == 99 and value == 1.0):
                counts[i] += 1
    steps = [b - a for a, b in zip(counts, counts[1:], strict=False)]
    for i in range(len(steps) - 1):
        if steps[i] <= 0 <= steps[i + 1]:
            return edges[i + 1]
    return None


def _bimodal(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = (0.05 * torch.randn(n, generator=generator)).abs()
    high = 0.9 + 0.05 * torch.randn(n, generator=generator)
    return torch.cat((low, high)).clamp(0, 1)


def test_valley_of_every_layer() -> None:
    scales = _scales(
        _bimodal(200, 0), _bimodal(37, 1), torch.linspace(0, 1, 500) ** 2, torch.full((64,), 0.5)
    )
    found = thresholds(scales)
    assert list(found) == list(scales)
    for name, gamma in scales.items():
        assert found[name] == _valley(gamma.tolist())
    assert found["g3"] == pytest.approx(0.01), "an unpolarized layer loses nothing"


@given(st.lists(st.integers(0, 100), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_valley_on_the_edges_of_bins(hundredths: list[int]) -> None:
    values = [_edges()[i] for i in hundredths]
    assert thresholds(_scales(values))["g0"] == _valley(values)


def test_a_layer_without_valley_has_no_threshold() -> None:
    rising = [i / 100 + 0.005 for i in range(100) for _ in range(i + 1)]
    assert _valley(rising) is None
    assert thresholds(_scales(rising, [0.5])) == {"g0": None, "g1": _edges()[1]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_valley_of_other_dtypes(dtype: torch.dtype) -> None:
    scales = _scales(_bimodal(200, 0), dtype=dtype)
    assert thresholds(scales)["g0"] == _valley(scales["g0"].detach().float().tolist())


def test_values_above_one_are_not_counted_and_harmless() -> None:
    values = [*_bimodal(50, 0).tolist(), 0.0, 1.5, 7.0]
    assert thresholds(_scales(values))["g0"] == _valley(values)


@pytest.mark.parametrize("method", ["valley", "fixed", "percentile"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_diverged_factors_name_their_layer(method: str, bad: float) -> None:
    scales = _scales([0.5] * 4, [0.5, bad, 0.25])
    with pytest.raises(ThresholdError, match="'g1' has 1 NaN or infinite γ of 3"):
        thresholds(scales, method, 0.5 if method == "percentile" else None)


def test_negative_factors_have_no_valley_and_are_told_what_to_use() -> None:
    scales = _scales([0.5] * 4, [0.5, -0.1, -0.2])
    with pytest.raises(ThresholdError, match="'g1' has 2 negative γ of 3.*percentile"):
        thresholds(scales)
    assert thresholds(scales, "fixed") == {"g0": 0.01, "g1": 0.01}
    assert thresholds(scales, "fixed", 0.15) == {"g0": 0.15, "g1": 0.15}


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60, unique_by=abs),
    st.floats(0.0, 0.999),
)
@settings(max_examples=60, deadline=None)
def test_percentile_cuts_the_exact_number(values: list[float], share: float) -> None:
    half = len(values) // 2
    scales = _scales(values[:half] or [9.0], values[half:])
    every = [abs(value) for gamma in scales.values() for value in gamma.tolist()]
    wanted = math.floor(round(share * len(every), 6))
    found = set(thresholds(scales, "percentile", share).values())
    (threshold,) = found
    assert sum(value <= (-1.0 if threshold is None else threshold) for value in every) == wanted


def test_percentile_is_the_share_that_was_meant() -> None:
    scales = _scales([i / 100 for i in range(1, 101)])
    for hundredths in (29, 57, 58):  # 0.29 * 100 is 28.999999999999996
        threshold = thresholds(scales, "percentile", hundredths / 100)["g0"]
        assert threshold == scales["g0"][hundredths - 1].item()


def test_percentile_says_when_ties_are_cut_together() -> None:
    scales = _scales([0.0] * 75 + [0.5 + i / 100 for i in range(25)])
    with pytest.warns(UserWarning, match="asks for 50 of 100 channels, but 75 have"):
        assert thresholds(scales, "percentile", 0.5) == {"g0": 0.0}


def test_wrong_arguments() -> None:
    scales = _scales([0.5])
    with pytest.raises(ArgumentError, match="method='otsu': choose one of 'valley', 'fixed'"):
        thresholds(scales, "otsu")
    with pytest.raises(ArgumentError, match="'valley' finds its own"):
        thresholds(scales, "valley", 0.1)
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="value="):
            thresholds(scales, "fixed", value)
    for share in (None, -0.1, 1.0, math.nan):
        with pytest.raises(ArgumentError, match="needs the share of channels to cut"):
            thresholds(scales, "percentile", share)
    with pytest.raises(ScalingFactorError, match="no scaling factors"):
        thresholds(ScalingFactors({}))


LAYERS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4)


@given(LAYERS, st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=4, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_a_ranking(layers: list[list[int]], valleys: list[int | None], data: st.DataObject) -> None:
    """Weakest first; of equals each layer gives the same share at any time, its last ones first."""
    compared = {f"g{i}": torch.tensor(layer).float() for i, layer in enumerate(layers)}
    drawn = dict(zip(compared, valleys, strict=False))
    bounds = data.draw(st.sampled_from([drawn, drawn, None]))
    ranking = Ranking(compared, bounds)

    def is_above(name: str, score: float) -> bool:
        return bounds is not None and (bounds[name] is None or score > bounds[name])

    channels = []
    for name, values in compared.items():
        for i, score in enumerate(values.tolist()):
            equal = [j for j, other in enumerate(values.tolist()) if other == score]
            share = (len(equal) - equal.index(i)) / len(equal)
            key = (is_above(name, score), score, share)
            channels.append((int(ranking.places[name][i]), key, name, score))
    channels.sort()
    assert [place for place, *_ in channels] == list(range(1, ranking.count + 1))
    keys = [key for _, key, *_ in channels]
    assert keys == sorted(keys)

    for count in range(ranking.count + 1):
        go, stay = channels[:count], channels[count:]
        places, found = ranking.bounds(count), ranking.thresholds(count)
        for place, _, name, score in channels:
            gone = places[name] is not None and place <= places[name]
            assert gone == (place <= count)
            assert not gone or score <= found[name]
        # What stays at or under the threshold equals the last that went, and is counted.
        limits = {name: -1.0 if bound is None else bound for name, bound in found.items()}
        under = [(name, score) for _, _, name, score in stay if score <= limits[name]]
        assert all(score == go[-1][3] for _, score in under)
        names = [name for name, _ in under]
        assert ranking.ties(count) == {name: names.count(name) for name in compared}
        names = [name for _, key, name, _ in go if key[0]]
        assert ranking.above_valleys(count) == {name: names.count(name) for name in compared}
