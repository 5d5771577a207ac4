"""HTML and SVG from Python, safe by construction: text that is not markup is escaped."""

import html
from collections.abc import Iterable
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
