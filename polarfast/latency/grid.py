"""Times at some widths, and between them."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

#: A layer is timed at one step, and at so many equal parts of its width.
PARTS = 8


def widths(full: int, step: int) -> list[int]:
    """The widths at which a layer is timed: one step, and eighths of its full width, rounded up to
    whole steps.

    Args:
        full: channels of the layer.
        step: widths within one step take the same time.
    """
    parts = {at_edge(-(-full * part // PARTS), full, step) for part in range(1, PARTS + 1)}
    return sorted(parts | {min(step, full)})


def at_edge(width: int, full: int, step: int) -> int:
    """The largest width that takes as long: the next whole step, and at most `full`."""
    return min(-(-width // step) * step, full)


def along(ends: Sequence[float], times: Sequence[float], width: float) -> float:
    """Linear interpolation; outside, the line through the two nearest ends goes on (never below
    0).

    Args:
        ends: ascending widths.
        times: at these.
    """
    if len(ends) == 1:
        return times[0]
    place = min(max(bisect_left(ends, width), 1), len(ends) - 1)
    low, high = ends[place - 1], ends[place]
    part = (width - low) / (high - low)
    return max(times[place - 1] + part * (times[place] - times[place - 1]), 0.0)


def across(
    times: Mapping[tuple[int, int], float],
    rows: Sequence[int],
    columns: Sequence[int],
    n_in: int,
    n_out: int,
) -> float:
    """Interpolation in both widths: exact for any time of the form a + b·n_in + c·n_out +
    d·n_in·n_out, which is what an operator that reads, multiplies and writes takes.

    Args:
        times: (inputs, outputs) -> time, at all pairs of `rows` and `columns`.
    """
    place = min(max(bisect_left(rows, n_in), 1), len(rows) - 1) if len(rows) > 1 else 0
    near = rows[max(place - 1, 0) : place + 1]
    found = [along(columns, [times[row, column] for column in columns], n_out) for row in near]
    return along(near, found, n_in)
