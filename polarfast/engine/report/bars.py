"""Bars: channels kept of each layer, and latency of the dense and the slim model."""

from collections.abc import Sequence

from ..histograms import layer_name
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
from .tables import significant, table

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 200, 44, 8, 10, 34
LATENCY_ROW = 54
NAME_LENGTH = 46


def channels_kept(runs: Sequence[RunRecord], legend: Sequence[Markup]) -> Markup:
    """A panel for each run with a plan, its layers in the order of the network."""
    return join(_channels(i, run, legend[i]) for i, run in enumerate(runs) if run.plan is not None)


def _channels(index: int, run: RunRecord, legend: Markup) -> Markup:
    plan = run.plan
    assert plan is not None  # the caller asks for such runs only
    widths = [layer.channels for layer in plan.layers.values()]
    kept = [plan.kept[name].numel() for name in plan.layers]
    x = Scale(0, max(len(widths), 1), LEFT, WIDTH - RIGHT)
    y = Scale(0, max([*widths, 1]) * 1.04, HEIGHT - BOTTOM, TOP)
    ticks = [tick for tick in nice_ticks(0, y.high, 4) if tick == int(tick)]
    parts = [frame(x, y, "layer, from input to output", (), ticks, lambda value: f"{value:g}")]
    gap = 0.12
    for place, (name, full, stay) in enumerate(zip(plan.layers, widths, kept, strict=True)):
        left, right = x(place + gap), x(place + 1 - gap)
        bars = [
            tag("path", class_=class_, d=_bar(left, right, y(count), y.start))
            for class_, count in (("full", full), ("stay", stay))
        ]
        parts.append(tag("g", tag("title", f"{layer_name(name)}: {stay} of {full} kept"), *bars))
    total = f"{sum(kept):,} of {sum(widths):,} channels kept in {len(widths)} layers"
    title = run.name if len(legend) > 1 else "Width of each layer"
    body = drawing(HEIGHT, f"{run.name}: {total}", *parts, class_=Look(index).colour)
    return panel(title, f"{total}; outline: before.", body, legend)


def _bar(left: float, right: float, top: float, bottom: float) -> str:
    return f"M{number(left)},{number(bottom)}V{number(top)}H{number(right)}V{number(bottom)}z"


def channels_table(runs: Sequence[RunRecord]) -> Markup:
    """Channels kept by layer, the runs side by side."""
    having = [(Look(i), run, run.plan) for i, run in enumerate(runs) if run.plan is not None]
    names = list(dict.fromkeys(name for _, _, plan in having for name in plan.layers))
    head = [tag("th", "Layer", scope="col")]
    head += [tag("th", look.sample(), run.name, scope="col") for look, run, _ in having]
    rows = [tag("tr", head)]
    for name in names:
        cells = [tag("th", layer_name(name), scope="row")]
        for look, _, plan in having:
            layer = plan.layers.get(name)
            cells.append(
                tag("td", "—")
                if layer is None
                else _share_cell(look, plan.kept[name].numel(), layer.channels)
            )
        rows.append(tag("tr", cells))
    caption = "Channels kept of each layer; bars: their share."
    return table("Channels kept", caption, rows[0], rows[1:], class_="channels")


def _share_cell(look: Look, kept: int, full: int) -> Markup:
    bar = tag("i", style=f"width:{100 * kept / full:.0f}%")
    return tag("td", tag("span", bar, class_="share"), f"{kept} of {full}", class_=look.colour)


def latency(runs: Sequence[RunRecord]) -> Markup:
    """A panel for each batch size that was measured."""
    having = [(i, run) for i, run in enumerate(runs) if run.results is not None]
    batches = sorted({batch for _, run in having for batch in _of(run)})
    return join(
        _latency(batch, [(i, r) for i, r in having if batch in _of(r)]) for batch in batches
    )


def _of(run: RunRecord) -> Sequence[int]:
    return [] if run.results is None else list(run.results.latency_ms)


def _latency(batch: int, runs: Sequence[tuple[int, RunRecord]]) -> Markup:
    pairs = [run.results.latency_ms[batch] for _, run in runs if run.results is not None]
    x = Scale(0, max(max(pair.dense, pair.slim) for pair in pairs), 46, WIDTH - 66)
    parts, words = [], []
    for row, ((index, run), pair) in enumerate(zip(runs, pairs, strict=True)):
        top = row * LATENCY_ROW
        change, dense, slim = (
            pair.faster,
            significant(pair.dense),
            significant(pair.slim),
        )
        words.append(f"{run.name}: dense {dense} ms, slim {slim} ms, {change}")
        look = Look(index)
        name = run.name if len(run.name) <= NAME_LENGTH else f"{run.name[: NAME_LENGTH - 1]}…"
        parts.append(tag("g", look.marker(6, top + 7), class_=look.colour))
        parts.append(label(16, top + 11, name, class_="strong"))
        parts.append(label(WIDTH - 2, top + 11, change, "end", "strong"))
        for line, (what, value) in enumerate((("dense", pair.dense), ("slim", pair.slim))):
            y = top + 18 + 14 * line
            bar = _bar(x.start, x(value), y, y + 11)
            class_ = "full" if what == "dense" else "stay"
            parts.append(label(x.start - 6, y + 9.5, what, "end"))
            parts.append(tag("path", class_=class_, d=bar))
            parts.append(label(x(value) + 6, y + 9.5, f"{significant(value)} ms"))
        parts[-6:] = [tag("g", *parts[-6:], class_=look.colour)]
    images = f"Batch of {batch} image{'s' * (batch > 1)}"
    body = drawing(len(runs) * LATENCY_ROW, f"{images}. " + "; ".join(words), *parts)
    return panel(images, "Median time of one forward pass; shorter is better.", body)
