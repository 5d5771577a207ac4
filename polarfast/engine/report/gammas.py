"""Distributions of the scaling factors: over the epochs (Fig. 4), and of each layer (Fig. 6)."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from ..histograms import RIDGE_BINS, layer_name, ridges
from .axes import WIDTH, Look, Markup, Scale, drawing, join, label, number, panel, tag
from .reading import GammaHistory, RunRecord

RIDGE_LEFT, RIDGE_RIGHT, RIDGE_SPAN, RIDGE_HEIGHT = 12, 46, 225, 66
SMALL_WIDTH, SMALL_HEIGHT = 132, 74
END_LEFT, END_HEIGHT = 44, 320
PAST_BINS = 25
PAST_EPOCHS, PAST_CELLS = 40, 250_000  # of the slider: at most so many epochs, and numbers in all
# Heights of the slider's histograms, one character each: nothing from HTML, JSON or a regex.
HEIGHTS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"


def over_time(runs: Sequence[RunRecord], legend: Sequence[Markup]) -> Markup:
    """One panel of ridges for each run that trained scaling factors; heights are comparable."""
    rows = {i: _ridge_rows(run.gammas) for i, run in enumerate(runs) if run.gammas is not None}
    top = max(float(shares.max()) for _, shares in rows.values())
    return join(
        panel(
            runs[i].name if len(runs) > 1 else "All scaling factors, epoch by epoch",
            f"{_channels(runs[i].gammas)} γ; heights: square root of their share.",
            _ridges(runs[i].name, Look(i), epochs, shares / top),
            legend[i],
        )
        for i, (epochs, shares) in rows.items()
    )


def _channels(gammas: GammaHistory | None) -> str:
    return f"{sum(g.numel() for g in gammas.last.values()):,}" if gammas is not None else "0"


def _ridge_rows(gammas: GammaHistory) -> tuple[list[int], Tensor]:
    """Numbers of some epochs, and their ridges [R, 50]."""
    epochs, counts = ridges(list(gammas.counts.sum(1)))
    return epochs, (counts / counts.sum(1, keepdim=True)).sqrt()


def _ridges(name: str, look: Look, epochs: Sequence[int], heights: Tensor) -> Markup:
    """Ridges, the first epoch at the back."""
    bottom, step = RIDGE_HEIGHT + RIDGE_SPAN + 8, RIDGE_SPAN / max(len(epochs) - 1, 1)
    x = Scale(0, 1, RIDGE_LEFT, WIDTH - RIDGE_RIGHT)
    parts = [label(x.end + 8, RIDGE_HEIGHT - 6, "epoch", class_="name")]
    for row, (epoch, line) in enumerate(zip(epochs, heights.tolist(), strict=True)):
        base = bottom - step * (len(epochs) - 1 - row)
        share = 45 + 55 * row / max(len(epochs) - 1, 1)
        outline = _steps(line, x, base, RIDGE_HEIGHT)
        path = tag(
            "path",
            tag("title", f"epoch {epoch}"),
            class_="ridge",
            d=outline,
            style=f"fill:color-mix(in oklab,var(--c) {share:.0f}%,var(--card))",
        )
        parts += [path, label(x.end + 8, base + 3.5, str(epoch))]
    parts.append(_gamma_axis(x, bottom, (0, 0.2, 0.4, 0.6, 0.8, 1)))
    parts.append(label(x.end, bottom + 31, "scaling factor γ", "end", "name"))
    ends = (heights[:, 0] ** 2).tolist()
    summary = (
        f"{name}: distribution of all scaling factors at epochs {epochs[0]} to {epochs[-1]}; "
        f"the bin at 0 is {_times(ends)}"
    )
    return drawing(bottom + 38, summary, *parts, class_=look.colour)


def _times(ends: Sequence[float]) -> str:
    if ends[0] == 0:
        return "empty at first" if ends[-1] > 0 else "empty throughout"
    return f"{ends[-1] / ends[0]:.1f} times as high at the end as at the start"


def _steps(heights: Sequence[float], x: Scale, base: float, height: float) -> str:
    """Outline of a histogram, closed along its base line."""
    parts, level = [f"M{number(x.start)},{number(base)}"], 0.0
    for place, value in enumerate(heights):
        if value != level:
            parts.append(f"H{number(x(place / len(heights)))}V{number(base - height * value)}")
            level = value
    return "".join(parts) + f"H{number(x.end)}V{number(base)}z"


def _gamma_axis(x: Scale, y: float, ticks: Sequence[float]) -> Markup:
    parts = [tag("path", class_="axis", d=f"M{number(x.start)},{number(y)}H{number(x.end)}")]
    for value in ticks:
        at = x(value)
        parts.append(tag("path", class_="axis", d=f"M{number(at)},{number(y)}v4"))
        parts.append(label(at, y + 15, f"{value:g}", "middle"))
    return join(parts)


def at_the_end(runs: Sequence[RunRecord], legend: Sequence[Markup]) -> Markup:
    """One panel for each run: all γ after sparsity training, and the thresholds (Fig. 1)."""
    return join(
        _end(run, Look(i), legend[i] if len(runs) > 1 else Markup())
        for i, run in enumerate(runs)
        if run.gammas is not None
    )


def _end(run: RunRecord, look: Look, legend: Markup) -> Markup:
    gammas = run.gammas
    assert gammas is not None  # the caller asks for such runs only
    fates = [_fate(run, gammas, name) for name in gammas.names]
    every = _histogram(torch.cat([values for values, _, _ in fates]))
    stay = _histogram(torch.cat([values[kept] for values, kept, _ in fates]))
    x = Scale(0, 1, END_LEFT, WIDTH - 12)
    y = Scale(0, float(every.max()) ** 0.5 * 1.04, END_HEIGHT - 38, 12)
    parts = []
    for value in root_ticks(float(every.max())):
        at = number(y(value**0.5))
        parts.append(tag("path", class_="grid", d=f"M{number(x.start)},{at}H{number(x.end)}"))
        parts.append(label(x.start - 6, float(at) + 3.5, f"{value:,g}", "end"))
    parts += _two_bars(every, stay, x, y)
    thresholds = [value for _, _, value in fates if value is not None]
    parts.append(_cutoffs(thresholds, x, y))
    parts.append(_gamma_axis(x, y.start, (0, 0.2, 0.4, 0.6, 0.8, 1)))
    parts.append(label(x.end, y.start + 31, "scaling factor γ", "end", "name"))
    note = f"{int(every.sum()):,} γ after epoch {gammas.counts.shape[0]}, square-root scale"
    if run.plan is not None:
        note += f"; filled: the {int(stay.sum()):,} that stay, outlined: removed"
    if thresholds:
        low, high = min(thresholds), max(thresholds)
        between = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        note += f"; dashed: thresholds, {between}"
    title = "At the end of sparsity training" if run.plan is not None else "As γ stand now"
    if legend:
        title = f"{run.name}: {title[0].lower()}{title[1:]}"
    body = drawing(END_HEIGHT, f"{run.name}: {note}", *parts, class_=look.colour)
    return panel(title, f"{note}.", body, legend)


def root_ticks(top: float) -> list[float]:
    """Round counts that are about evenly apart on a square-root scale."""
    rounds = [m * 10.0**p for p in range(9) for m in (1, 2, 5)]
    ticks = [0.0]
    for value in rounds:
        if value <= top and value**0.5 - ticks[-1] ** 0.5 >= 0.12 * top**0.5:
            ticks.append(value)
    return ticks


def _cutoffs(thresholds: Sequence[float], x: Scale, y: Scale) -> Markup:
    """The range of the layers' thresholds: a line at both ends, or one where they agree."""
    ends = sorted({min(max(value, 0.0), 1.0) for value in thresholds})
    lines = (
        f"M{number(x(v))},{number(y.end - 6)}V{number(y.start)}" for v in ends[:1] + ends[1:][-1:]
    )
    return tag("path", class_="cutoff", d="".join(lines))


def per_layer(runs: Sequence[RunRecord], legend: Sequence[Markup]) -> Markup:
    """A block of small histograms for each run, one for each layer; the first block is open."""
    having = [i for i, run in enumerate(runs) if run.gammas is not None]
    return join(
        _block(i, runs[i], legend[i], opened=i == having[0], share=len(having)) for i in having
    )


def _block(index: int, run: RunRecord, legend: Markup, opened: bool, share: int) -> Markup:
    gammas = run.gammas
    assert gammas is not None  # the caller asks for such runs only
    smalls = [_small(run, layer) for layer in range(len(gammas.names))]
    epochs = gammas.counts.shape[0]
    grid = tag("ul", *smalls, class_=f"smalls {Look(index).colour}")
    return tag(
        "details",
        tag("summary", legend, f"{run.name}, after epoch {epochs}: {len(smalls)} layers"),
        _slider(index, gammas, share),
        grid,
        open=opened,
        class_="block",
    )


def _small(run: RunRecord, layer: int) -> Markup:
    """The γ of one layer: those that stay, those that go, and the threshold between."""
    gammas = run.gammas
    assert gammas is not None  # as above
    name = gammas.names[layer]
    values, kept, threshold = _fate(run, gammas, name)
    what = f"{int(kept.sum())} of {values.numel()} kept"
    if run.plan is None:
        what = f"{values.numel()} channels"
    x = Scale(0, 1, 3, SMALL_WIDTH - 3)
    every, stay = _histogram(values), _histogram(values[kept])
    top = max(float(every.max()), 1.0) ** 0.5
    parts = _two_bars(every, stay, x, Scale(0, top, SMALL_HEIGHT, 0.06 * SMALL_HEIGHT))
    parts.append(_gamma_axis(x, SMALL_HEIGHT, ()))
    parts.append(tag("path", class_="past", d=""))
    if threshold is not None and 0 <= threshold <= 1:
        line = f"M{number(x(threshold))},2V{SMALL_HEIGHT}"
        parts.append(
            tag("path", tag("title", f"threshold {threshold:.3g}"), class_="cutoff", d=line)
        )
        what += f", threshold {threshold:.2f}"
    summary = f"Histogram of γ in {name}: {what}"
    parts += [label(3, SMALL_HEIGHT + 11, "0"), label(x.end, SMALL_HEIGHT + 11, "1", "end")]
    image = drawing(SMALL_HEIGHT + 14, summary, *parts, width=SMALL_WIDTH)
    return tag("li", tag("b", layer_name(name)), tag("span", what), image)


def _fate(run: RunRecord, gammas: GammaHistory, name: str) -> tuple[Tensor, Tensor, float | None]:
    """Of one layer: γ [C], which channels stay (all, where there is no plan), the threshold."""
    values = gammas.last[name].float()
    if run.plan is None:
        return values, torch.ones(values.numel(), dtype=torch.bool), None
    layer = run.plan.layers[name]  # of the same run, as reading has made sure
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[run.plan.kept[name]] = True
    return values, kept, layer.threshold


def _histogram(values: Tensor) -> Tensor:
    return torch.histc(values.abs().clamp(max=1.0), RIDGE_BINS, 0.0, 1.0)


def _two_bars(every: Tensor, stay: Tensor, x: Scale, y: Scale) -> list[Markup]:
    """What goes, standing on what stays; heights are square roots of the counts."""
    zeros = torch.zeros_like(stay)
    return [_bars(every, stay, x, y, "gone"), _bars(stay, zeros, x, y, "stay")]


def _bars(counts: Tensor, below: Tensor, x: Scale, y: Scale, class_: str) -> Markup:
    parts = []
    width = number((x.end - x.start) / RIDGE_BINS)
    for place, (high, low) in enumerate(zip(counts.tolist(), below.tolist(), strict=True)):
        if high > low:
            bottom, left = number(y(low**0.5)), number(x(place / RIDGE_BINS))
            parts.append(f"M{left},{bottom}V{number(y(high**0.5))}h{width}V{bottom}z")
    return tag("path", class_=class_, d="".join(parts))


def _slider(index: int, gammas: GammaHistory, share: int) -> Markup:
    """Earlier epochs of all layers, for the page's script; without it nothing is shown."""
    epochs, layers = gammas.counts.shape[:2]
    most = max(2, min(PAST_EPOCHS, PAST_CELLS // (share * layers * PAST_BINS)))
    places = torch.linspace(0, epochs - 1, min(most, epochs), dtype=torch.float64)
    chosen = sorted({round(place) for place in places.tolist()})
    if len(chosen) < 2:
        return Markup()
    counts = gammas.counts[chosen].double().reshape(len(chosen), layers, PAST_BINS, -1).sum(3)
    heights = (counts / counts.amax(2, keepdim=True).clamp(min=1)).sqrt()
    cells = (heights * (len(HEIGHTS) - 1)).ceil().long()
    rows = ["".join(HEIGHTS[c] for c in epoch.flatten().tolist()) for epoch in cells]
    data = {"epochs": [e + 1 for e in chosen], "bins": PAST_BINS, "rows": rows}
    output = tag("output", f"epoch {epochs}", for_=f"slider{index}")
    control = tag(
        "input",
        type="range",
        id=f"slider{index}",
        min=0,
        max=len(chosen) - 1,
        value=len(chosen) - 1,
        step=1,
    )
    text = tag("label", "Epoch of sparsity training", for_=f"slider{index}")
    script = tag("script", Markup(json.dumps(data)), type="application/json")
    return tag("div", text, control, output, script, class_="slider", hidden=True)
