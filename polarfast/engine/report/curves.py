"""Training curves: one panel for each quantity, every run in it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .axes import (
    WIDTH,
    Look,
    Markup,
    Scale,
    drawing,
    frame,
    join,
    label,
    nice_ticks,
    number,
    panel,
    tag,
)
from .reading import RunRecord

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 246, 50, 10, 22, 36
MARKERS = 6  # on each line
LOG_FROM = 30.0  # times the smallest value: the axis becomes logarithmic
LABEL_ROOM = 66  # units that "fine-tuning" needs


@dataclass(frozen=True)
class Quantity:
    """What a panel shows.

    Attributes:
        key: in the lines of metrics.jsonl. text: a value, for people. factor: on the values.
        note: how to read the panel.
        top_only: the lowest values of the first epochs may lie below the axis.
        log: where the values span far, the axis is logarithmic.
        zero: the axis begins at 0.
    """

    key: str
    title: str
    note: str
    text: Callable[[float], str]
    factor: float = 1.0
    top_only: bool = False
    log: bool = False
    zero: bool = False


def _percent(value: float) -> str:
    return f"{value:.4g} %"


def _plain(value: float) -> str:
    return f"{value:.3g}"


QUANTITIES = (
    Quantity("loss", "Training loss", "Mean over the epoch, without the regularizer", _plain,
             log=True),
    Quantity("accuracy", "Accuracy", "On images that are not trained on", _percent, top_only=True),
    Quantity("cut", "MACs cut if pruned now", "Predicted after each epoch of sparsity training",
             _percent, 100.0, zero=True),
    Quantity("at_zero", "γ at 0", "Share of the scaling factors below 0.01", _percent, 100.0,
             zero=True),
    Quantity("lr", "Learning rate", "Of the last step of the epoch", _plain, zero=True),
    Quantity("lam", "λ", "Strength of the regularizer", _plain, zero=True),
    Quantity("t", "t", "Balance of the regularizer's two terms", _plain),
    Quantity("images_per_second", "Speed", "Images trained on a second", lambda v: f"{v:,.4g}",
             zero=True),
)  # fmt: skip
ONLY_IF_CHANGING = ("lam", "t")  # the settings say what they are where they are constant

Line = list[tuple[int, float]]


def training_curves(runs: Sequence[RunRecord]) -> Markup:
    """All panels that some run has values for."""
    return join(_panel(quantity, runs) for quantity in QUANTITIES if _worth(quantity, runs))


def _worth(quantity: Quantity, runs: Sequence[RunRecord]) -> bool:
    lines = [run.series(quantity.key) for run in runs]
    if quantity.key in ONLY_IF_CHANGING:
        return any(len({value for _, value in line}) > 1 for line in lines)
    return any(lines)


def _panel(quantity: Quantity, runs: Sequence[RunRecord]) -> Markup:
    lines = [[(i, v * quantity.factor) for i, v in run.series(quantity.key)] for run in runs]
    indices = [index for line in lines for index, _ in line]
    # A panel of sparsity training only ends with it; a single epoch still needs some width.
    x = Scale(min(0, min(indices)), max(max(indices), 2), LEFT, WIDTH - RIGHT)
    y, clipped = _vertical(quantity, lines)
    notes = [quantity.note] + ["logarithmic axis"] * y.log
    notes += ["the first epochs lie below the axis"] * clipped
    ticks = [tick for tick in nice_ticks(x.low, x.high, 6) if tick == int(tick)]
    parts = [frame(x, y, "epoch", ticks, y.ticks(6), quantity.text)]
    parts.append(_stage_marks(runs, lines, x))
    for index, (run, line) in enumerate(zip(runs, lines, strict=True)):
        if line:
            parts.append(_line(Look(index), line, x, y, f"{run.name}: {quantity.title}"))
    clip = f"clip-{quantity.key}"
    box = tag("rect", x=LEFT, y=TOP - 5, width=WIDTH - LEFT - RIGHT, height=y.start - TOP + 6)
    defs = tag("defs", tag("clipPath", box, id=clip))
    body = drawing(
        HEIGHT,
        _summary(quantity, runs, lines),
        defs,
        *parts[:2],
        tag("g", *parts[2:], clip_path=f"url(#{clip})" if clipped else None),
        class_="curves",
        data_chart=_data(quantity, runs, lines, x, y),
    )
    return panel(quantity.title, "; ".join(notes) + ".", body)


def _vertical(quantity: Quantity, lines: Sequence[Line]) -> tuple[Scale, bool]:
    """The vertical scale, and whether some values lie below it."""
    values = [value for line in lines for _, value in line]
    low, high = min(values), max(values)
    start, end = HEIGHT - BOTTOM, TOP
    if quantity.log and low > 0 and high / low > LOG_FROM:
        return Scale(low / 1.1, high * 1.1, start, end, log=True), False
    if quantity.zero:
        low = min(low, 0.0)
    clipped = False
    if quantity.top_only:
        settled = [value for line in lines for _, value in line[len(line) // 5 :]]
        # Only where the start would squeeze the rest into a corner.
        clipped = (high - min(settled)) < 0.5 * (high - low)
        low = min(settled) if clipped else low
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    margin = 0.06 * (high - low)
    high = high + margin
    low = low if quantity.zero and low == 0 else low - margin
    return Scale(low, high, start, end), clipped


def _line(look: Look, line: Line, x: Scale, y: Scale, title: str) -> Markup:
    points = [(x(index), y(value)) for index, value in line]
    # Markers stand apart from those of other runs that lie on the same line.
    stride = max(1, len(points) // MARKERS)
    marked = points[(look.index * stride // 3) % stride :: stride]
    path = tag(
        "path",
        tag("title", title),
        class_="line",
        d=_path(line, points),
        stroke_dasharray=look.dash,
    )
    markers = [look.marker(*point) for point in marked or points[-1:]]
    return tag("g", path, *markers, class_=look.colour)


def _path(line: Line, points: Sequence[tuple[float, float]]) -> str:
    """Neighbouring epochs joined; a gap where values are missing."""
    parts, before = [], None
    for (index, _), (x, y) in zip(line, points, strict=True):
        parts.append(f"{'L' if before == index - 1 else 'M'}{number(x)},{number(y)}")
        before = index
    return "".join(parts)


def _stage_marks(runs: Sequence[RunRecord], lines: Sequence[Line], x: Scale) -> Markup:
    """A line where a run goes over to its next stage."""
    places: dict[tuple[str, int], list[int]] = {}
    for number_of_run, (run, line) in enumerate(zip(runs, lines, strict=True)):
        for stage, first in run.stages[1:]:
            if line and line[0][0] < first <= line[-1][0]:
                places.setdefault((stage, first), []).append(number_of_run)
    parts = []
    for order, ((stage, first), whose) in enumerate(places.items()):
        at = x(first - 0.5)
        parts.append(
            tag("path", class_="stage", d=f"M{number(at)},{number(TOP - 8)}V{HEIGHT - BOTTOM}")
        )
        if len(places) == 1:
            fits = x.end - at >= LABEL_ROOM
            parts.append(
                label(at + (4 if fits else -4), TOP - 10, stage, "start" if fits else "end")
            )
        else:
            looks = [Look(index) for index in whose]
            parts += [
                tag("g", look.marker(at + 9 * place, TOP - 12 - 3 * (order % 2)),
                    class_=look.colour)
                for place, look in enumerate(looks)
            ]  # fmt: skip
    return join(parts)


def _summary(quantity: Quantity, runs: Sequence[RunRecord], lines: Sequence[Line]) -> str:
    parts = []
    for run, line in zip(runs, lines, strict=True):
        if line:
            (first, begin), (last, end) = line[0], line[-1]
            parts.append(
                f"{run.name}: {quantity.text(begin)} at epoch {first}, {quantity.text(end)} at "
                f"epoch {last}"
            )
    return f"{quantity.title}. " + "; ".join(parts)


def _data(
    quantity: Quantity, runs: Sequence[RunRecord], lines: Sequence[Line], x: Scale, y: Scale
) -> str:
    """What the page's script needs to read values off the panel."""
    digits = 4 if quantity.factor == 1.0 else 2
    return json.dumps(
        {
            "x": [x.low, x.high, x.start, x.end],
            "y": [y.end, y.start],
            "unit": " %" if quantity.text is _percent else "",
            "lines": [
                [run.name, line[0][0], _dense(line, digits)] if line else None
                for run, line in zip(runs, lines, strict=True)
            ],
        },
        separators=(",", ":"),
    )


def _dense(line: Line, digits: int) -> list[float | None]:
    """Values from the first epoch to the last, None where one is missing."""
    known = dict(line)
    values = (known.get(index) for index in range(line[0][0], line[-1][0] + 1))
    return [None if value is None else _rounded(value, digits) for value in values]


def _rounded(value: float, digits: int) -> float:
    """To significant digits for small values, to a hundredth for large ones."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    return round(value, max(2, digits - 1 - math.floor(math.log10(abs(value)))))
