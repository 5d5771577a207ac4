"""Axes of the figures: scales, ticks, the frame, and how a run looks in every figure."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | float | Iterable[str | float]"

# Elements without content, of HTML.
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Strings that are not :class:`Markup` are escaped, numbers are shortened.

    Args:
        attributes: ``class_`` means class, ``aria_label`` aria-label; None and False leave an
            attribute out, True writes it without a value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(_text(value))}"')
    if name in _VOID:
        return Markup(f"<{' '.join(parts)}>")
    return Markup(f"<{' '.join(parts)}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children one after another, escaped where they are not markup."""
    return Markup("".join(_escaped(child) for child in children))


def number(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def _escaped(child: Child) -> str:
    if isinstance(child, Markup):
        return str(child)
    if isinstance(child, str | int | float):
        return html.escape(_text(child))
    return "".join(_escaped(part) for part in child)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


# All figures are drawn this wide, and shown in columns about as wide, so that text keeps its size.
WIDTH = 400
COLOURS = 7  # in page.css, as --run0 ... --run6
DASHES = (None, "7 3", "2 2.5", "9 3 2 3", "12 4", "5 2 1.5 2 1.5 2", "1 3")
# Around the origin, about 7 units wide.
MARKERS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.2L3.9,3H-3.9z",
    "M0,-4.5L4.5,0L0,4.5L-4.5,0z",
    "M0,4.2L3.9,-3H-3.9z",
    "M-1.3,-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "M-4.2,-1.4L0,-4.4L4.2,-1.4L2.6,3.6H-2.6z",
)


@dataclass(frozen=True)
class Look:
    """Colour, dashes and marker of a run: no two of the first 49 runs share all three."""

    index: int

    @property
    def colour(self) -> str:
        """Name of the class that sets ``--c``."""
        return f"c{self.index % COLOURS}"

    @property
    def dash(self) -> str | None:
        return DASHES[(self.index + self.index // COLOURS) % len(DASHES)]

    def marker(self, x: float, y: float) -> Markup:
        """The run's marker with its middle at a point."""
        path = MARKERS[(self.index + self.index // COLOURS) % len(MARKERS)]
        return tag("path", class_="marker", d=path, transform=f"translate({number(x)} {number(y)})")

    def sample(self) -> Markup:
        """A short line with the marker, for legends. Says nothing to a screen reader."""
        line = tag("path", class_="line", d="M1,7H33", stroke_dasharray=self.dash)
        return tag(
            "svg",
            line,
            self.marker(17, 7),
            class_=f"sample {self.colour}",
            viewBox="0 0 34 14",
            width=34,
            height=14,
            aria_hidden="true",
        )


@dataclass(frozen=True)
class Scale:
    """Data to coordinates, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low / 1e3))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale, about ``count`` of them."""
        if not self.log:
            return nice_ticks(self.low, self.high, count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 3 else (1,)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]; about ``count``, at least 2.

    Args:
        low, high: low < high.
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    fit = [m * power for m in (10, 5, 2, 1, 0.5, 0.2)]
    for step in fit[max(i for i, step in enumerate(fit) if step >= rough * 0.999) :]:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last > first:
            break
    return [i * step for i in range(first, last + 1)]


def frame(
    x: Scale,
    y: Scale,
    x_label: str,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    y_text: Callable[[float], str],
) -> Markup:
    """Grid lines, numbers at the axes, and the name of the horizontal axis."""
    parts = []
    for value in y_ticks:
        at = y(value)
        parts.append(tag("path", class_="grid", d=f"M{number(x.start)},{number(at)}H{x.end:g}"))
        parts.append(label(x.start - 6, at + 3.5, y_text(value), "end"))
    parts.append(tag("path", class_="axis", d=f"M{number(x.start)},{number(y.start)}H{x.end:g}"))
    for value in x_ticks:
        at = x(value)
        parts.append(tag("path", class_="axis", d=f"M{number(at)},{number(y.start)}v4"))
        parts.append(label(at, y.start + 15, f"{value:g}", "middle"))
    parts.append(label(x.end, y.start + 29, x_label, "end", "name"))
    return join(parts)


def label(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> Markup:
    """Text in a figure."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def panel(title: str, note: str, body: Markup, tag_line: Markup | None = None) -> Markup:
    """A figure with its heading and a sentence on how to read it."""
    caption = [tag("h3", tag_line or "", title)]
    if note:
        caption.append(tag("p", note))
    return tag("figure", tag("figcaption", caption), body, class_="panel")


def drawing(
    height: float, summary: str, *children: Markup, width: float = WIDTH, **attributes: str
) -> Markup:
    """An SVG image; ``summary`` is what a screen reader says of it."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=summary,
        **attributes,
    )
