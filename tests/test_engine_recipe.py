"""Recipes: what comes with the package, what YAML may hold, what is refused."""

from pathlib import Path

import pytest
import yaml

from polarfast.engine.recipe import Recipe, Stage, load_recipe, recipe_from_dict
from polarfast.errors import ArgumentError


@pytest.mark.parametrize("name", ["demo", "demo-quick"])
def test_packaged_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.data == "digits" and recipe.model == "resnet20"
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_file_round_trip(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe


def test_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text, and people write it."""
    values = load_recipe("demo").to_dict()
    values["sparsity"]["lam"] = "1e-3"
    values["sparsity"]["t"] = 1
    sparsity = recipe_from_dict(values).sparsity
    assert (sparsity.lam, sparsity.t) == (1e-3, 1.0)


def changed(path: str, value: object) -> dict[str, object]:
    values = load_recipe("demo").to_dict()
    *outer, last = path.split(".")
    inner = values
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lambda", 1, "'lambda' is not a setting"),
        ("train.lamda", 1, "'train.lamda' is not a setting; settings: train.epochs"),
        ("train.epochs", "many", "train.epochs='many' must be of type int"),
        ("train.epochs", 1.5, "train.epochs=1.5 must be of type int"),
        ("train.epochs", True, "train.epochs=True must be of type int"),
        ("sparsity.lam", "strong", "sparsity.lam='strong' must be of type float"),
        ("sparsity.residual", "drop", "must be one of keep, expand, couple"),
        ("train", 3, "'train' must hold settings of its own"),
        ("train.lr", 0.0, "lr=0.0"),
        ("train.warmup", 1.0, "warmup=1.0"),
        ("finetune.epochs", -1, "epochs=-1"),
    ],
)
def test_refusals_name_the_setting(path: str, value: object, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        recipe_from_dict(changed(path, value))
    assert message in str(error.value)


def test_missing_setting() -> None:
    values = load_recipe("demo").to_dict()
    del values["train"]["lr"]
    with pytest.raises(ArgumentError, match="'train.lr' is missing"):
        recipe_from_dict(values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere", None, "neither a .yaml file nor"),
        ("gone.yaml", None, "no such file"),
        ("list.yaml", "- 1\n", "key: value"),
        ("broken.yaml", "a: [", "not valid YAML"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = name
    if text is not None:
        (tmp_path / name).write_text(text)
        path = str(tmp_path / name)
    with pytest.raises(ArgumentError, match=message):
        load_recipe(path)


def test_defaults_are_a_recipe() -> None:
    sparsity = load_recipe("demo").sparsity
    stage = Stage(epochs=1, lr=0.1)
    assert Recipe("digits", "resnet20", sparsity, stage, stage).seed == 0
