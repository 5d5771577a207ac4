"""Figures of a run, as PNG: γ with the threshold, γ over the epochs, channels kept per layer.

Colours are of the Okabe-Ito set and cividis, which colour-blind people tell apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..storage import write_atomically
from .histograms import BINS, layer_name, ridges

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#D0D0D0"
DPI = 200
ROOT_TICKS = (1, 5, 20, 50, 100, 200, 350, 500, 1000, 2000, 3500, 5000, 10000, 20000, 35000)


def gamma_histogram(
    path: Path,
    scales: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    thresholds: Mapping[str, float | None],
) -> None:
    """Histogram of all γ, those kept and those removed, and the thresholds between (Fig. 1).

    Args:
        scales: γ of each layer.
        kept: indices of each layer's channels that stay.
        thresholds: of each layer; None where there is none.
    """
    edges = np.linspace(0, 1, BINS + 1)
    every, stay = np.zeros(BINS, int), np.zeros(BINS, int)
    for name, values in scales.items():
        gamma = values.detach().float().cpu()
        every += np.histogram(gamma.numpy(), edges)[0]
        stay += np.histogram(gamma[kept[name]].numpy(), edges)[0]
    gone = every - stay
    figure, axes = _figure(6.0, 3.4)
    for counts, bottom, colour, what in (
        (gone, np.zeros_like(gone), ORANGE, "removed"),
        (stay, gone, BLUE, "kept"),
    ):
        label = f"{what} ({counts.sum():,})"
        axes.bar(edges[:-1], counts, 1 / BINS, bottom, align="edge", color=colour, label=label)
    _mark_thresholds(axes, [v for v in thresholds.values() if v is not None])
    # The peak at 0 holds most of the factors; on a linear scale nothing else would be seen.
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    top = float(every.max()) * 1.1
    axes.set_ylim(0, top)
    axes.set_yticks([0] + [tick for tick in ROOT_TICKS if top / 200 < tick <= top])
    axes.set(xlim=(-0.01, 1), xlabel="scaling factor γ", ylabel="channels (square-root scale)")
    axes.legend(frameon=False, loc="upper right")
    save(figure, path)


def _mark_thresholds(axes: Axes, values: Sequence[float]) -> None:
    if not values:
        return
    low, middle, high = min(values), float(np.median(values)), max(values)
    label = f"threshold {middle:.2f} in every layer"
    if low < high:
        label = f"layers' thresholds: median {middle:.2f}\n({low:.2f} to {high:.2f})"
    axes.axvspan(low, high, color="black", alpha=0.08, linewidth=0, zorder=0)
    axes.axvline(middle, color="black", linestyle="--", linewidth=1.2, label=label)


def gamma_over_epochs(path: Path, histograms: Sequence[Tensor]) -> None:
    """Histograms of all γ, one ridge for each of some epochs, the first at the back (Fig. 4).

    Args:
        histograms: counts in 100 bins over [0, 1], one of each epoch.
    """
    epochs, counts = ridges(histograms)
    rows = np.sqrt(counts.numpy())
    heights = rows / rows.max() * 4.2
    figure, axes = _figure(6.0, 5.0)
    edges = np.linspace(0, 1, rows.shape[1] + 1)
    colours = colormaps["cividis"](np.linspace(0.0, 0.92, len(epochs)))
    for row, (epoch, colour) in enumerate(zip(epochs, colours, strict=True)):
        base = len(epochs) - 1 - row
        outline = base + heights[row]
        axes.stairs(outline, edges, baseline=base, fill=True, color=colour, zorder=row + 1)
        axes.stairs(outline, edges, baseline=None, color="white", linewidth=0.6, zorder=row + 1)
        axes.hlines(base, 0, 1, color=colour, linewidth=0.8, zorder=row + 1)
        axes.text(1.015, base, str(epoch), va="center", fontsize=7.5)
    axes.text(1.015, len(epochs), "epoch", va="center", fontsize=7.5)
    axes.set(xlim=(0, 1), ylim=(-0.2, None), yticks=[])
    axes.set(xlabel="scaling factor γ", ylabel="channels (square-root scale)")
    axes.spines["left"].set_visible(False)
    save(figure, path)


def channels_kept(path: Path, kept: Mapping[str, int], widths: Mapping[str, int]) -> None:
    """Channels that stay in each layer, in front of the layer's full width."""
    names = list(map(layer_name, widths))
    full = list(widths.values())
    left = [kept[name] for name in widths]
    figure, axes = _figure(max(6.0, 0.36 * len(names)), 3.4)
    places = range(len(names))
    axes.bar(places, full, 0.78, color=GREY, label=f"before ({sum(full):,})")
    axes.bar(places, left, 0.78, color=BLUE, label=f"kept ({sum(left):,})")
    for place, count in zip(places, left, strict=True):
        axes.text(place, count + max(full) * 0.012, str(count), ha="center", fontsize=7.5)
    axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set(xlim=(-0.7, len(names) - 0.3), ylabel="channels")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, panels = subplots(1, width, height)
    return figure, panels[0]


def subplots(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side on a page of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))
