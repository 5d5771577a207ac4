"""YAML 1.2 (its core schema), read within limits and written so that it comes back the same.

PyYAML does the grammar. Its own rules are YAML 1.1's: `010` is eight, `1:30:00` is 5400, the last
of two equal keys wins, and a short text of aliases or brackets takes minutes. (ruamel.yaml knows
the newer rules, but takes ten seconds for 3,000 brackets, and a file can ask it for the old ones.)
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from ..documents import DIGEST, brief, check_extent, digest_of, short

MOST_BYTES = 2**15  # a recipe with every setting has 2,000
MOST_VALUES = 2_000
DEPTH = 12
_SEAL = f"# {DIGEST}: "
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
#: Plain scalars of the core schema, the first that fits.
_RULES = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {}
    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > DEPTH or self.nodes > MOST_VALUES:
            deep = f"it is nested more than {DEPTH} deep"
            raise yaml.MarkedYAMLError(
                problem=deep if self.depth > DEPTH else f"it has more than {MOST_VALUES:,} values",
                problem_mark=self.peek_event().start_mark,
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = dict(yaml.SafeDumper.yaml_implicit_resolvers)


for _name, _pattern, _first in _RULES:
    for _kind in (_Loader, _Dumper):  # written so that readers of either version agree
        _kind.add_implicit_resolver(
            _TAG + _name, re.compile(f"(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes line breaks that ASCII lacks as they are, and reads them back as spaces.
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The values in a text, and the lines of its keys, from 1, by dotted name.

    Raises:
        ValueError: it is no YAML, has a key twice, or is longer or deeper than any recipe. The
            message names the line.
    """
    if len(text.encode()) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
    if text.count("[") + text.count("{") > MOST_BYTES // 64:
        raise ValueError("it has more brackets than settings")
    try:
        loader = _Loader(text.removeprefix("\ufeff"))
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        why = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{line}{brief(why)}") from error
    except yaml.YAMLError as error:
        raise ValueError(brief(error).replace("\n", " ")) from error
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} deep") from None
    if wrong := check_extent(values, MOST_VALUES):
        raise ValueError(f"it {wrong}")
    lines: dict[str, int] = {}
    _note_lines(node, "", lines, set())
    return values, lines


def to_yaml_text(values: Any) -> str:
    """The inverse of `parse_yaml`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def sealed_yaml(text: str) -> str:
    """A text with its digest as a comment behind it."""
    return f"{text}{_SEAL}{digest_of(text.encode())}\n"


def is_sealed(text: str) -> bool:
    """Whether a text ends in its digest.

    Raises:
        ValueError: it ends in that of another text.
    """
    body, _, last = text.removesuffix("\n").rpartition("\n")
    if not last.startswith(_SEAL.rstrip()):
        return False
    if text != sealed_yaml(f"{body}\n"):
        raise ValueError(f"it is not what was written, by its {DIGEST} in the last line")
    return True


def _note_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int], seen: set[int]) -> None:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        lines[name] = key.start_mark.line + 1
        _note_lines(value, f"{name}.", lines, seen)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    values: dict[Any, Any] = {}
    yield values
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _wrong(key_node, "a key is no plain word or number")
        key = loader.construct_object(key_node)
        if key == "<<" and key_node.style is None:
            raise _wrong(key_node, "'<<' merged settings in YAML 1.1: write them out here")
        if key in values:
            raise _wrong(key_node, f"the key {short(key)} is there twice")
        values[key] = loader.construct_object(value_node)


def _scalar(convert: Callable[[str], Any], kind: str) -> Callable[[_Loader, yaml.Node], Any]:
    def construct(loader: _Loader, node: yaml.Node) -> Any:
        try:
            return convert(node.value)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _wrong(node, f"{short(node.value)} is no {kind}") from None

    return construct


def _to_int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2])
    return int(text[2:], base) if base else int(text)


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _unknown(loader: _Loader, node: yaml.Node) -> Any:
    raise _wrong(node, f"the tag {short(node.tag)} has no place in a recipe")


def _wrong(node: yaml.Node, why: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=node.start_mark)


_TRUTH = {"true": True, "false": False}
_Loader.yaml_constructors = {
    f"{_TAG}map": _mapping,
    f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
    f"{_TAG}null": yaml.SafeLoader.construct_yaml_null,
    f"{_TAG}bool": _scalar(lambda text: _TRUTH[text.lower()], "truth value"),
    f"{_TAG}int": _scalar(_to_int, "whole number"),
    f"{_TAG}float": _scalar(_to_float, "number"),
    None: _unknown,
}
