"""Ranges of numeric settings."""

from typing import Any

from ..documents import short
from ..errors import ArgumentError

#: Seeds as torch's generators and the data plan take them.
MOST_SEED = 2**63 - 1
#: More than any count that makes sense; far from where counting in 64 bits ends.
MANY = 10**9


def check_ranges(settings: Any, prefix: str = "", /, **ranges: tuple[float, float]) -> None:
    """Hold numbers against their ranges, both ends included.

    Args:
        settings: holds them as attributes; None is none.
        prefix: of their names, for the message.
        ranges: name -> lowest and highest value.

    Raises:
        ArgumentError: a number lies outside, or is NaN.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise ArgumentError(
                f"{prefix}{name}={short(value)}: must be at least {low:g} and at most {high:g}"
            )
