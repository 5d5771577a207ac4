"""What a plan may not do to a layer: `Limits`, from the arguments that users give."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import ArgumentError

Number = TypeVar("Number", int, float)
#: One limit for all layers, or regular expressions on γ's names -> limits; the first that matches
#: a name decides, and a layer that none matches has no such limit.
Counts = int | Mapping[str, int]
Shares = float | Mapping[str, float]


@dataclass(frozen=True)
class Limits:
    """The limits of each layer, by γ name.

    Attributes:
        round_to: its width is a multiple of this.
        least: it keeps so many channels; 0: it may also disappear.
        why: the argument that `least` comes from.
        given: the arguments, those that limit anything: JSON data.
        sizes: its number of channels.
    """

    round_to: Mapping[str, int]
    least: Mapping[str, int]
    why: Mapping[str, str]
    given: Mapping[str, Any]
    sizes: Mapping[str, int]

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, int],
        round_to: Counts = 1,
        min_channels: Counts = 1,
        max_share: Shares | None = None,
    ) -> "Limits":
        """From arguments as in `plan`.

        Args:
            sizes: γ name -> number of channels of every layer that may lose some.

        Raises:
            ArgumentError: a number is out of its range, or a pattern matches no layer.
        """
        rounded = _by_layer("round_to", round_to, 1, sizes, _check_count)
        narrowest = _by_layer("min_channels", min_channels, 1, sizes, _check_count)
        shares = _by_layer("max_share", max_share, 1.0, sizes, _check_share)
        least, why = {}, {}
        for name, size in sizes.items():
            number = min(narrowest[name], size) if narrowest[name] > 1 else 0
            stays = size - math.floor(round(shares[name] * size, 6))  # 0.29 of 100 is 29
            least[name] = max(number, stays)
            why[name] = "max_share" if stays > number else "min_channels"
        given = {"round_to": round_to, "min_channels": min_channels, "max_share": max_share}
        kept = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in given.items()
            if value is not None and value != 1
        }
        return cls(rounded, least, why, kept, sizes)

    @property
    def none(self) -> bool:
        """Whether there is no limit for any layer."""
        return not any(self.least.values()) and all(n == 1 for n in self.round_to.values())

    def without(self, argument: str) -> "Limits":
        """The same but for one of the arguments given."""
        return Limits.of(self.sizes, **{k: v for k, v in self.given.items() if k != argument})

    def unrounded(self) -> "Limits":
        """The same without `round_to`."""
        return replace(self, round_to=dict.fromkeys(self.round_to, 1))


def bound_of(threshold: float | None) -> float:
    """What scores are compared with: nothing is at or under the bound of no threshold."""
    return -1.0 if threshold is None else threshold


def _by_layer(
    argument: str,
    value: Number | Mapping[str, Number] | None,
    without: Number,
    sizes: Mapping[str, int],
    check: Callable[[str, Any], None],
) -> dict[str, Number]:
    if not isinstance(value, Mapping):
        number = without if value is None else value
        check(argument, number)
        return dict.fromkeys(sizes, number)
    found: dict[str, Number] = {}
    for pattern, number in value.items():
        check(f"{argument}[{pattern!r}]", number)
        matching = _matching(argument, pattern, sizes)
        found = dict.fromkeys(matching, number) | found  # the first that matches decides
    return {name: found.get(name, without) for name in sizes}


def _matching(argument: str, pattern: str, names: Iterable[str]) -> list[str]:
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ArgumentError(
            f"{argument}[{pattern!r}]: not a regular expression on the names of γ: {error}"
        ) from error
    matching = [name for name in names if regex.search(name)]
    if not matching:
        known = ", ".join(list(names)[:3])
        raise ArgumentError(
            f"{argument}[{pattern!r}] matches no layer that may lose channels; their names look "
            f"like: {known}, …"
        )
    return matching


def _check_count(argument: str, number: Any) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ArgumentError(f"{argument}={number!r}: give a whole number of channels, at least 1")


def _check_share(argument: str, number: Any) -> None:
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 1:
        raise ArgumentError(
            f"{argument}={number!r}: give the largest share of its channels that a layer may lose, "
            "from 0 to 1"
        )
