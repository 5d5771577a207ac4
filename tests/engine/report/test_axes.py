"""How the report's figures are drawn: ticks, what tells runs apart, contrast."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from polarfast.engine.report.axes import DASHES, Look, Scale, nice_ticks
from polarfast.engine.report.gammas import root_ticks


def test_no_two_runs_look_alike() -> None:
    looks = [(Look(i).colour, Look(i).dash, Look(i).marker(0, 0)) for i in range(49)]
    assert len(set(looks)) == 49
    # Those beside each other differ in more than colour.
    for chunk in range(0, 49, 7):
        for part in (1, 2):
            assert len({look[part] for look in looks[chunk : chunk + 7]}) == len(DASHES)


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6), count=st.integers(2, 8))
def test_ticks_are_round_and_within(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    margin = 1e-6 * (span + abs(low))
    assert 2 <= len(ticks) <= 2.5 * count + 2
    assert low - margin <= ticks[0] and ticks[-1] <= low + span + margin
    scale = Scale(low, low + span, 0.0, 100.0)
    gaps = [scale(b) - scale(a) for a, b in zip(ticks, ticks[1:], strict=False)]
    assert gaps == pytest.approx(gaps[:1] * len(gaps), abs=1e-2)


@given(low=st.floats(1e-8, 1e3), factor=st.floats(31, 1e8))
def test_ticks_of_logarithmic_axes(low: float, factor: float) -> None:
    scale = Scale(low, low * factor, 0.0, 100.0, log=True)
    ticks = scale.ticks()
    assert len(ticks) >= 1 and all(-0.2 <= scale(tick) <= 100.2 for tick in ticks)
    assert scale(low) == pytest.approx(0) and scale(low * factor) == pytest.approx(100)
    assert scale(low * factor**0.5) == pytest.approx(50)


@given(st.floats(1, 1e8))
def test_ticks_of_counts(top: float) -> None:
    ticks = root_ticks(top)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 9 and ticks[-1] <= top


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark() -> None:
    style = ROOT / "polarfast/engine/report/page.css"
    blocks = re.findall(r":root \{(.*?)\}", style.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for ink in ("ink", "soft", "link"):
            for ground in ("page", "card"):
                dark, light = sorted(luminance(colours[name]) for name in (ink, ground))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
