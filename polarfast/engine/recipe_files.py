"""Reading and writing recipes as YAML, and telling two of them apart."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from polarfast.engine.recipe import Recipe
from polarfast.errors import ArgumentError


def recipe_names() -> list[str]:
    """Names of the recipes that come with polarfast."""
    folder = resources.files("polarfast") / "recipes"
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file, or by name from those that come with polarfast ("demo").

    Raises:
        ArgumentError: no such file or recipe, not YAML, or a key or value that does not fit.
    """
    file = Path(path)
    if file.suffix in {".yaml", ".yml"}:
        if not file.is_file():
            raise ArgumentError(f"recipe '{path}': there is no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"recipe '{path}': no text in UTF-8 ({error})") from error
    elif str(path) in recipe_names():
        text = (resources.files("polarfast") / "recipes" / f"{path}.yaml").read_text("utf-8")
    else:
        known = ", ".join(recipe_names())
        raise ArgumentError(f"recipe '{path}': give a .yaml file or one of {known}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError(f"recipe '{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"recipe '{path}': must hold 'key: value' lines")
    return recipe_from_dict(values)


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every setting, as :func:`load_recipe` reads it."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.to_dict`.

    Raises:
        ArgumentError: a key is unknown or missing, or a value has the wrong type.
    """
    return _build(Recipe, values, "")


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Dotted names of the settings that two recipes' dicts do not share."""
    names = []
    for key in sorted(first.keys() | second.keys(), key=str):
        mine, other = first.get(key), second.get(key)
        if isinstance(mine, dict) and isinstance(other, dict) and key != "rates":
            names += [f"{key}.{name}" for name in differing_settings(mine, other)]
        elif mine != other:
            names.append(str(key))
    return names


def _build(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints), key=str)
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        raise ArgumentError(f"recipe: '{prefix}{unknown[0]}' is not a setting; settings: {known}")
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        raise ArgumentError(f"recipe: '{prefix}{missing[0]}' is missing")
    converted = {k: _convert(hints[k], v, prefix + k) for k, v in values.items()}
    try:
        return kind(**converted)
    except ArgumentError as error:
        if not prefix or str(error).startswith(prefix):
            raise
        raise ArgumentError(f"{prefix.removesuffix('.')}: {error}") from error


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ArgumentError(f"recipe: '{name}' must hold settings of its own, not {value!r}")
        return _build(kind, value, f"{name}.")
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            shown = ", ".join(map(str, choices))
            raise ArgumentError(f"recipe: {name}={value!r} must be one of {shown}")
        return value
    if origin is types.UnionType:  # a number or None
        (kind,) = set(typing.get_args(kind)) - {type(None)}
        return None if value is None else _convert(kind, value, name)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(typing.get_args(kind), value, name)
    # YAML 1.1 reads 1e-3 (no dot) as a string, and an int is a fine float; a bool is neither.
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ArgumentError(f"recipe: {name}={value!r} must be of type {kind.__name__}")


def _convert_mapping(kinds: tuple[Any, Any], value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ArgumentError(f"recipe: {name}={value!r} must be a mapping, e.g. {{60: 0.02}}")
    of_keys, of_values = kinds
    return {
        _convert(of_keys, key, f"{name}: {key}"): _convert(of_values, entry, f"{name}[{key}]")
        for key, entry in value.items()
    }
