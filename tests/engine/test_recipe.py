"""Recipes: what YAML may hold, what is refused, and which settings tell two runs apart."""

import math
import re
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.engine import TINY, on

from polarfast.engine.recipe import (
    Recipe,
    Stage,
    differing_settings,
    load_recipe,
    recipe_from_dict,
    recipe_names,
    to_yaml,
)
from polarfast.engine.yamls import parse_yaml, to_yaml_text
from polarfast.errors import ArgumentError


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_every_row_of_the_paper_is_packaged() -> None:
    assert {f"cifar{n}-{net}" for n in (10, 100) for net in ("resnet56", "vgg16")} <= set(
        recipe_names()
    )
    assert {"imagenet-resnet50", "imagenet-mobilenet_v2", "demo", "mnist"} <= set(recipe_names())


@pytest.mark.parametrize("name", ["demo", "cifar10-resnet56"])
def test_file_round_trip(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text, and people write it."""
    path = tmp_path / "mine.yaml"
    text = to_yaml(load_recipe("cifar10-vgg16")).replace("3.0e-05", "3e-5")
    assert "lam: 3e-5" in text
    path.write_text(text.replace("t: 1.5", "t: 1"), encoding="utf-8")
    sparsity = load_recipe(path).sparsity
    assert (sparsity.lam, sparsity.t) == (3e-5, 1.0)


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
        ("sparsity.residual", "drop", "must be one of keep, expand, expand-all, couple"),
        ("sparsity.cut", 1.5, "sparsity.cut=1.5: a share in (0, 1)"),
        ("sparsity.cut", 0.5, "only regularizer 'flops-target' aims at a share"),
        ("sparsity.regularizer", "flops-target", "'flops-target' needs the share"),
        ("train", 3, "'train' must hold settings of its own"),
        ("train.lr", 0.0, "train: lr=0.0"),
        ("train.lr", float("inf"), "train: lr=inf"),
        ("train.warmup", 60.0, "train: warmup=60.0"),
        ("train.warmup", float("nan"), "train: warmup=nan"),
        ("sparsity.upper", None, "'valley' needs every γ clamped"),
        ("sparsity.regularize", "bn1", "'valley' needs every γ clamped"),
        ("train.rates", {2: 0.1}, "train: rates: give"),
        ("train.schedule", "step", "train: rates: give"),
        ("train.rates", [1], "must be a mapping"),
        ("train.rates", {"soon": 0.1}, "must be of type int"),
        ("finetune.epochs", -1, "finetune: epochs=-1"),
        ("pruning.method", "uniform", "'uniform' needs the share"),
        ("pruning.method", "percentile", "needs either value= or cut="),
        ("pruning.value", 0.3, "'valley' takes neither"),
        ("pruning", {"method": "fixed", "cut": 0.5}, "pruning.cut: 'fixed' takes a threshold"),
        ("pruning", {"method": "fixed", "value": -0.1}, "pruning.value=-0.1: for 'fixed'"),
        ("pruning", {"method": "percentile", "value": 1.0}, "pruning.value=1.0: for 'percentile'"),
        ("pruning", {"method": "random", "cut": 0.5, "value": 0.5}, "'random' takes cut= alone"),
        ("pruning", {"method": "uniform", "cut": 0.5}, "sparsity.regularizer must be 'none'"),
        ("data.name", "svhn", "must be one of digits"),
        ("batch_size", 0, "batch_size=0: must be at least 1"),
        ("accumulate", 0, "accumulate=0"),
        ("ema", 1.0, "ema=1.0: must lie in [0, 1)"),
        ("clip", -1.0, "clip=-1.0: must not be negative"),
        ("precision", "fp8", "must be one of fp32, bf16, fp16"),
        ("hardware.keep", 0, "hardware.keep=0"),
        ("train.distill", 0.5, "train.distill: there is no teacher yet"),
        ("finetune.distill", 1.5, "distill=1.5: a weight in [0, 1]"),
        ("finetune.temperature", 0.0, "temperature=0.0"),
        ("hardware.checkpoint_minutes", -1.0, "hardware.checkpoint_minutes=-1.0"),
    ],
)
def test_refusals_name_the_setting(path: str, value: object, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        recipe_from_dict(changed(path, value))
    assert message in str(error.value)


def test_rates_are_refused_one_by_one() -> None:
    with pytest.raises(ArgumentError, match=r"rates\[0\]=0.1"):
        Stage(3, 0.1, "step", {0: 0.1})
    with pytest.raises(ArgumentError, match=r"rates\[2\]=0.0"):
        Stage(3, 0.1, "step", {2: 0.0})


def test_nothing_can_be_steered_without_training() -> None:
    steered = replace(load_recipe("demo").sparsity, regularizer="flops-target", cut=0.5)
    with pytest.raises(ArgumentError, match="train.epochs=0"):
        replace(load_recipe("demo"), sparsity=steered, train=Stage(0, 0.1))


def test_a_width_is_trained_from_scratch() -> None:
    values = load_recipe("demo").to_dict() | {"weights": "w.pt"}
    values["pruning"] |= {"method": "uniform", "cut": 0.5}
    values["sparsity"] |= {"regularizer": "none"}
    with pytest.raises(ArgumentError, match="weights: .*from scratch"):
        recipe_from_dict(values)


def test_a_few_settings_are_enough() -> None:
    """As docs/engine.md has them."""
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    written = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert written
    for each in written:
        recipe = recipe_from_dict(yaml.safe_load(each))
        assert recipe.sparsity.regularizer == "flops-target" and recipe.sparsity.cut == 0.5


def test_missing_setting() -> None:
    values = load_recipe("demo").to_dict()
    del values["train"]["lr"]
    with pytest.raises(ArgumentError, match="'train.lr' is missing"):
        recipe_from_dict(values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere", None, "give a .yaml file or one of cifar10-resnet56"),
        ("gone.yaml", None, "no such file"),
        ("list.yaml", "- 1\n", "key: value"),
        ("empty.yaml", "", "key: value"),
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


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match="UTF-8"):
        load_recipe(tmp_path / "bytes.yaml")


def test_what_tells_two_runs_apart() -> None:
    mine = TINY.identity()
    same: list[Recipe] = [
        on(TINY, threads=4, device="auto", keep=7),
        replace(TINY, accumulate=2),
        replace(TINY, data=replace(TINY.data, root="elsewhere", workers=0)),
    ]
    assert all(differing_settings(other.identity(), mine) == [] for other in same)
    others: dict[str, Recipe] = {
        "batch_size": replace(TINY, batch_size=48),
        "data.shift": replace(TINY, data=replace(TINY.data, shift=2)),
        "finetune.lr": replace(TINY, finetune=replace(TINY.finetune, lr=0.3)),
        "train.rates": replace(TINY, train=replace(TINY.train, schedule="step", rates={1: 0.1})),
    }
    for name, other in others.items():
        assert name in differing_settings(other.identity(), mine)
        assert len(differing_settings(other.identity(), mine)) == (2 if "rates" in name else 1)


def numbers(values: dict[str, object], kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings that are numbers, rates included."""
    found = []
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            found += numbers(values, hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif {int, float} & {hint, *get_args(hint)}:
            found.append(prefix + name)
    return found


NUMBERS = numbers({}, Recipe)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name: str) -> None:
    """Whatever is far outside is refused with the recipe, by name, before anything is built."""
    assert len(NUMBERS) > 35
    values = [10**30, -(10**30), 2**64, -(2**64), 10**5000]
    if name.rpartition(".")[2] not in ("seed", "split_seed"):
        values.append(2**63 - 1)
    for value in [*values, math.inf, -math.inf, math.nan, 1e300, -1e300]:
        with pytest.raises(ArgumentError) as error:
            recipe_from_dict(changed(name, value))
        assert name.rpartition(".")[2] in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [("hardware.threads", 100_000), ("seed", 2**64), ("seed", -1), ("data.shift", 1_000_000),
     ("data.image_size", 1_000_000), ("data.workers", 100_000), ("finetune.epochs", 10**9)],
)  # fmt: skip
def test_numbers_that_no_machine_can_do(name: str, value: int) -> None:
    with pytest.raises(ArgumentError, match=rf"{name.rpartition('.')[2]}=-?\d+: must be at"):
        recipe_from_dict(changed(name, value))


YAML = {
    "<<: {lam: 1.0}": r"line \d+: '<<' merged settings in YAML 1.1: write them out here",
    "lam: 3.0e-05\n  lam: 1": r"line \d+: the key 'lam' is there twice",
    "lam: 010": "lam=10.0",  # ten, as YAML 1.2 has it; YAML 1.1: eight
    "lam: 1:30:00": r"line \d+: sparsity.lam='1:30:00' must be of type float",
    "lam: yes": r"line \d+: sparsity.lam='yes' must be of type float",
    "lam: 1_000": r"line \d+: sparsity.lam='1_000' must be of type float",
    "lam: !!python/object:os.system {}": r"line \d+: the tag .* has no place in a recipe",
    "lam: -1": r"line \d+: sparsity.lam=-1.0: must not be negative",
    "lam: 1e300": r"line \d+: sparsity.lam=1e\+300: must be at least 0",
    "lamb: 1": r"line \d+: 'sparsity.lamb' is not a setting",
    "lam: [": r"line \d+: ",
}


@pytest.mark.parametrize("line", YAML)
def test_yaml_is_version_1_2_and_errors_name_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.yaml"
    text = to_yaml(load_recipe("cifar10-vgg16"))
    number = text[: text.index("lam: 3.0e-05")].count("\n") + 1
    path.write_text(text.replace("lam: 3.0e-05", line), encoding="utf-8")
    try:
        found = f"lam={load_recipe(path).sparsity.lam}"
    except ArgumentError as error:
        found = str(error)
        assert str(path) in found
        lines = [int(each) for each in re.findall(r"line (\d+)", found)]
        assert lines and all(number <= each <= number + 2 for each in lines)
    assert re.search(YAML[line], found)


LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.text(), st.floats(allow_nan=False))
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_what_is_written_comes_back(values: dict[str, object]) -> None:
    """Texts that look like numbers of either version of YAML too."""
    assert parse_yaml(to_yaml_text(values))[0] == values


TEXTS = ["010", "0o10", "1e3", "1:30", "1_0", "yes", "on", "null", "~", "<<", ".5", "+.inf", "0x1"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_look_like_something_else(text: str) -> None:
    assert parse_yaml(to_yaml_text({"a": text, text: 1}))[0] == {"a": text, text: 1}
    assert yaml.safe_load(to_yaml_text({"a": text})) == {"a": text}
