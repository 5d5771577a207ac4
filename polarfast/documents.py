"""Texts that come back from files, perhaps from strangers: read within limits, held against their
own digest, and against what they may hold.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: How deep data may be nested: what polarfast writes goes to about 10.
DEPTH = 32
#: Commas and opening brackets of a text: each may take 70 bytes of memory.
ITEMS, BYTES_AN_ITEM = 1_000_000, 64
#: Whole numbers have at most so many bits: seeds and counts have 64.
BITS = 64
DIGEST = "digest"
_SHOWN = 200


def parse_json(text: str, beside: int = 0) -> Any:
    """JSON data, of a bounded size.

    Args:
        text: whole.
        beside: bytes of the file that the text is a part of: larger files may describe more.

    Raises:
        ValueError: it is no JSON, or larger, deeper or longer than any text of polarfast's; or a
            key is there twice.
    """
    most = ITEMS + beside // BYTES_AN_ITEM
    if text.count(",") + text.count("[") + text.count("{") > most:
        raise ValueError(f"it lists more than {most:,} things")
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} deep") from None
    if wrong := check_extent(data, 2 * most + 2):
        raise ValueError(f"it {wrong}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)} is there twice")
    return found


def check_extent(data: Any, most: int, others: tuple[type, ...] = ()) -> str:
    """What is wrong with the size of plain data; empty if nothing is.

    Whatever stands in several places counts as often: a short file can repeat itself without end.

    Args:
        most: so many values.
        others: what it may hold beside numbers, texts, lists and mappings.
    """
    left: list[tuple[Any, int]] = [(data, 0)]
    count = 0
    while left:
        part, depth = left.pop()
        count += 1
        if count + len(left) > most:
            return f"stands for more than {most:,} values"
        if isinstance(part, str):
            if not part.isascii() and any("\ud800" <= letter <= "\udfff" for letter in part):
                return "holds a text that is no Unicode"
        elif isinstance(part, int):
            if part.bit_length() > BITS:
                return f"holds a whole number of more than {BITS} bits"
        elif isinstance(part, (dict, list, tuple)):
            if depth == DEPTH:
                return f"is nested more than {DEPTH} deep"
            if len(part) * (1 + isinstance(part, dict)) + len(left) > most:
                return f"stands for more than {most:,} values"
            if isinstance(part, dict):
                left.extend((key, depth + 1) for key in part)
                part = part.values()
            left.extend((each, depth + 1) for each in part)
        elif part is not None and not isinstance(part, (float, *others)):
            return "holds more than plain data"
    return ""


def short(value: Any) -> str:
    """A value from a file, for a message."""
    if isinstance(value, int) and value.bit_length() > 10 * BITS:
        return f"a number of {value.bit_length():,} bits"  # Python does not write the longest ones
    shown = repr(value) if not isinstance(value, (dict, list, tuple)) else type(value).__name__
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def brief(message: object) -> str:
    """The beginning of a message that may be long."""
    whole_text = str(message)
    return whole_text if len(whole_text) <= 5 * _SHOWN else f"{whole_text[: 5 * _SHOWN]}…"


# --- digests


def digest_of(content: bytes) -> str:
    """16 hexadecimal digits that any change of the content changes."""
    return hashlib.sha256(content).hexdigest()[:16]


def digests(data: Mapping[str, Any]) -> dict[str, str]:
    """Of each field of JSON data, so that the message can name the one that differs."""
    return {name: _digest(value) for name, value in json.loads(json.dumps(data)).items()}


def check_digests(data: Mapping[str, Any], optional: Iterable[str] = ()) -> None:
    """Hold the fields against their `digests`, which are one of them; texts of older versions have
    none.

    Args:
        optional: names of fields that may be missing.

    Raises:
        ValueError: a field is not what was written.
    """
    known = data.get(DIGEST, {})
    names = [name for name in data if name != DIGEST]
    if not isinstance(known, dict) or (DIGEST in data and not known.keys() >= {*names}):
        raise ValueError(f"its {DIGEST} is damaged")
    for name, found in known.items():
        if name in data and name != DIGEST and found == _digest(data[name]):
            continue
        if name in data or name not in optional:
            raise ValueError(
                f"{short(name)} is not what was written, by its {DIGEST} (take {DIGEST} out of the "
                "text where the change is meant)"
            )


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with one digest of all the rest as its last field."""
    return {**data, DIGEST: _digest(json.loads(json.dumps(data)))}


def unsealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data without its one digest, which texts of older versions lack.

    Raises:
        ValueError: the data is not what was written.
    """
    rest = dict(data)
    found = rest.pop(DIGEST, None)
    if DIGEST in data and found != _digest(rest):
        raise ValueError(
            f"it is not what was written, by its {DIGEST} (take that out where the change is meant)"
        )
    return rest


def _digest(data: Any) -> str:
    return digest_of(json.dumps(_spelled(data), sort_keys=True).encode())


def _spelled(data: Any) -> Any:
    """1.0 is 1: programs that copy JSON write either."""
    if isinstance(data, float) and data.is_integer():
        return int(data)
    if isinstance(data, dict):
        return {name: _spelled(part) for name, part in data.items()}
    return [_spelled(part) for part in data] if isinstance(data, list) else data


# --- what data may hold

Check = Callable[[Any], bool]


def whole(low: int, high: int) -> Check:
    """A whole number in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def real(low: float, high: float) -> Check:
    """A number in [low, high], not NaN."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def truth(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def one_of(*choices: Any) -> Check:
    """One of some strings."""
    return lambda value: isinstance(value, str) and value in choices


def optional(check: Check) -> Check:
    """Something, or none."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A list of one kind."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def mapping_of(check: Check) -> Check:
    """A mapping from names to one kind."""
    return lambda value: (
        isinstance(value, dict) and all(map(text, value)) and all(map(check, value.values()))
    )


def check_fields(
    data: Any, fields: Mapping[str, Check], what: str, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Hold a mapping against its schema.

    Args:
        fields: name -> whether a value can stand there.
        what: of which the mapping is, for the message.
        optional: names that may be missing.

    Raises:
        ValueError: a field is missing, unknown, or of another kind.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what} is {short(data)}, no mapping")
    if unknown := [name for name in data if name not in fields]:
        raise ValueError(f"{what} has a field {short(unknown[0])}, which is not known")
    for name, check in fields.items():
        if name not in data:
            if name not in optional:
                raise ValueError(f"{what} has no field {name!r}")
        elif not check(data[name]):
            raise ValueError(f"{name} of {what} is {short(data[name])}, which it cannot be")
    return data
