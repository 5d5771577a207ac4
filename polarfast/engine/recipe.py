"""Recipes: every setting of a run, as typed dataclasses that read and write YAML."""

import dataclasses
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from polarfast.errors import ArgumentError


@dataclass(frozen=True)
class Stage:
    """One stretch of training, with a learning rate of its own.

    Attributes:
        epochs: how many passes over the training images; 0 skips the stage.
        lr: peak learning rate.
        schedule: "cosine" falls to 0 over the stage, "constant" stays at ``lr``.
        warmup: share of the stage's steps over which the rate first rises linearly from 0.
    """

    epochs: int
    lr: float
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ArgumentError(f"epochs={self.epochs}: must not be negative")
        if not self.lr > 0:
            raise ArgumentError(f"lr={self.lr}: must be positive")
        if not 0 <= self.warmup < 1:
            raise ArgumentError(f"warmup={self.warmup}: must be a share of the stage in [0, 1)")


@dataclass(frozen=True)
class Sparsity:
    """What acts on the scaling factors (paper, Eq. 2).

    Attributes:
        lam: λ, strength of the regularizer.
        t: balance of its two terms.
        upper: a, the largest value a scaling factor may have.
        init: value of every scaling factor before the first step.
        residual: what happens to channels that are added: "keep", "expand" or "couple".
    """

    lam: float
    t: float
    upper: float = 1.0
    init: float = 0.5
    residual: Literal["keep", "expand", "couple"] = "expand"


@dataclass(frozen=True)
class Recipe:
    """Sparsity training, pruning and fine-tuning of one model on one data set.

    Attributes:
        data, model: names known to ``polarfast.engine.data`` and ``.models``.
        sparsity: the regularizer.
        train: stage with the regularizer; finetune: stage of the slim model, without it.
        batch_size: images a step; the rest of an epoch that does not fill a batch is left out.
        shift: largest random shift of a training image, in pixels.
        seed: of the initial weights, the order of the images and their shifts.
        test_seed: which images form the test set, where the data set has no split of its own.
    """

    data: str
    model: str
    sparsity: Sparsity
    train: Stage
    finetune: Stage
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 0
    seed: int = 0
    test_seed: int = field(default=0)

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain numbers and strings."""
        return dataclasses.asdict(self)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.to_dict`.

    Raises:
        ArgumentError: a key is unknown or missing, or a value has the wrong type.
    """
    return _build(Recipe, values, "")


def differing_settings(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Dotted names of the settings that two recipes' dicts do not share."""
    names = []
    for key in sorted(first.keys() | second.keys()):
        mine, other = first.get(key), second.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            names += [f"{key}.{name}" for name in differing_settings(mine, other)]
        elif mine != other:
            names.append(key)
    return names


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file, or by name from those that come with polarfast ("demo").

    Raises:
        ArgumentError: no such file or recipe, not YAML, or a key or value that does not fit.
    """
    file = Path(path)
    if file.suffix in {".yaml", ".yml"}:
        if not file.is_file():
            raise ArgumentError(f"recipe '{path}': there is no such file")
        text = file.read_text(encoding="utf-8")
    else:
        packaged = resources.files("polarfast") / "recipes" / f"{path}.yaml"
        if not packaged.is_file():
            raise ArgumentError(f"recipe '{path}': neither a .yaml file nor a recipe of polarfast")
        text = packaged.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError(f"recipe '{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"recipe '{path}': must hold 'key: value' lines")
    return recipe_from_dict(values)


def _build(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        raise ArgumentError(f"recipe: '{prefix}{unknown[0]}' is not a setting; settings: {known}")
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise ArgumentError(f"recipe: '{prefix}{missing[0]}' is missing")
    return kind(**{k: _convert(hints[k], v, prefix + k) for k, v in values.items()})


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ArgumentError(f"recipe: '{name}' must hold settings of its own, not {value!r}")
        return _build(kind, value, f"{name}.")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ArgumentError(f"recipe: {name}={value!r} must be one of {', '.join(choices)}")
        return value
    # YAML 1.1 reads 1e-3 (no dot) as a string, and an int is a fine float; a bool is neither.
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise ArgumentError(f"recipe: {name}={value!r} must be of type {kind.__name__}")
