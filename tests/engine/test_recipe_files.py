"""Every packaged recipe, on tiny sets in the real formats: dry run, two real steps, rates."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.engine import go_on
from support.image_sets import write_cifar10, write_cifar100, write_folder, write_mnist

import polarfast as pf
from polarfast import cli
from polarfast.engine.data.source import load
from polarfast.engine.folder import Artifacts
from polarfast.engine.networks import Networks
from polarfast.engine.recipe import Recipe, load_recipe, recipe_names, to_yaml
from polarfast.engine.trainer import learning_rate

SETS: dict[str, Any] = {
    "cifar10": lambda root: write_cifar10(root, per_batch=10),
    "cifar100": lambda root: write_cifar100(root, train=100, test=20),
    "mnist": lambda root: write_mnist(root, "MNIST"),
    "folder": write_folder,
    "digits": lambda root: None,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, write in SETS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write(made[name])
    return made


def data_name(name: str) -> str:
    return load_recipe(name).data.name


def small(name: str) -> list[str]:
    """Options that make images small, and the set what the recipe's model needs."""
    return ["--data.image-size", "64"] if data_name(name) == "folder" else []


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_dry_run(
    name: str,
    roots: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    root = roots[data_name(name)]
    before = sorted(root.rglob("*"))
    arguments = ["--data.root", str(root), "--batch-size", "2", "--dry-run"]
    assert cli.main(["run", name, *arguments, "--hardware.device", "cpu", *small(name)]) == 0
    output = capsys.readouterr().out
    recipe = load_recipe(name)
    sparsity = to_yaml(recipe).partition("sparsity:")[2].partition("batch_size:")[0]
    for text in (f"model: {recipe.model}", sparsity, "Layers that may be pruned"):
        assert text in output
    images = int(re.search(r"([\d,]+) to train", output)[1].replace(",", ""))  # type: ignore[index]
    for stage, of in (("train", recipe.train), ("finetune", recipe.finetune)):
        steps = images // 2 * of.epochs
        assert re.search(rf"{stage}: steps .* {of.epochs} x [\d,]+ = {steps:,} ", output), output
    assert "Nothing was trained or written" in output
    assert list(tmp_path.iterdir()) == [] and sorted(root.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_two_steps(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    """Of either stage, with pruning between them, exact to rounding."""
    recipe = load_recipe(name)
    side = 64 if recipe.data.name == "folder" else recipe.data.image_size
    data = replace(recipe.data, root=str(roots[recipe.data.name]), image_size=side, workers=0)
    if recipe.data.name == "digits":
        data = replace(data, train_images=20)
    hardware = replace(recipe.hardware, device="cpu")
    short = {"epochs": 1, "warmup": 0.0}
    recipe = replace(recipe, data=data, hardware=hardware)
    recipe = replace(
        recipe,
        batch_size=batch_of_two_steps(recipe),
        train=replace(recipe.train, **short),
        finetune=replace(recipe.finetune, **short),
        pruning=replace(recipe.pruning, min_channels=2),
    )
    run = go_on(recipe, tmp_path / "run")
    assert run.phase == "done" and len(run.history) == 2
    assert run.facts["verified_error"] < 1e-3
    plan = pf.PruningPlan.from_json((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan.macs <= plan.macs_before
    with torch.no_grad():
        assert torch.isfinite(run.networks.slim().eval()(run.networks.example)).all()


def batch_of_two_steps(recipe: Recipe) -> int:
    return load(recipe.data, torch.device("cpu")).train_size // 2


#: Epoch -> rate, as the paper and its appendix give them (epochs from 0).
CIFAR = {0: 0.01, 1: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}
CIFAR_TUNING = {0: 1e-3, 19: 1e-3, 20: 5e-4, 60: 2.5e-4, 149: 2.5e-4, 150: 1e-4, 199: 1e-4}
RATES: dict[str, tuple[int, dict[int, float], int, dict[int, float]]] = {
    **{
        f"cifar{n}-{net}": (200, CIFAR, 200, CIFAR_TUNING)
        for n in (10, 100)
        for net in ("resnet56", "vgg16")
    },
    "imagenet-resnet50": (
        *(120, {0: 0.1, 39: 0.1, 40: 0.01, 79: 0.01, 80: 0.001, 119: 0.001}),
        *(128, {0: 0.05, 64: 0.025}),
    ),
    "imagenet-mobilenet_v2": (256, {5: 0.4}, 256, {0: 0.05, 128: 0.025}),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    train_epochs, train, tuning_epochs, tuning = RATES[name]
    assert (recipe.train.epochs, recipe.finetune.epochs) == (train_epochs, tuning_epochs)
    for stage, rates in ((recipe.train, train), (recipe.finetune, tuning)):
        for epoch, rate in rates.items():
            assert learning_rate(stage, 100 * epoch, 100) == pytest.approx(rate), epoch


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cifar10-resnet56", (128, 5e-5, 1.4, 5e-4, True)),
        ("cifar100-resnet56", (128, 5e-5, 1.4, 5e-4, True)),
        ("cifar10-vgg16", (128, 3e-5, 1.5, 5e-4, True)),
        ("cifar100-vgg16", (128, 3e-5, 1.5, 5e-4, True)),
        ("imagenet-resnet50", (512, 8e-5, 1.2, 1e-4, True)),
        ("imagenet-mobilenet_v2", (1024, 2.5e-5, None, 4e-5, False)),
    ],
)
def test_settings_are_the_papers(name: str, settings: tuple[Any, ...]) -> None:
    recipe = load_recipe(name)
    batch, lam, t, decay, on_norms = settings
    assert (recipe.batch_size, recipe.momentum) == (batch, 0.9)
    assert (recipe.weight_decay, recipe.decay_norms) == (decay, on_norms)
    assert (recipe.sparsity.lam, recipe.sparsity.upper, recipe.sparsity.clamp) == (lam, 1.0, "all")
    assert recipe.sparsity.t == (t or 1.2) and recipe.pruning.method == "valley"
    if t is None:  # steered towards the share kept: 0.7
        assert recipe.sparsity.cut == pytest.approx(0.3)
        assert recipe.sparsity.regularizer == "flops-target" and recipe.sparsity.gates


def test_which_layers_of_resnet50_feel_the_regularizer() -> None:
    from torchvision.models import resnet50

    recipe = load_recipe("imagenet-resnet50")
    scales = pf.scaling_factors(
        resnet50(), torch.zeros(1, 3, 64, 64), residual=recipe.sparsity.residual
    )
    chosen = scales.select(recipe.sparsity.regularize)
    assert len(scales) == 48 and len(chosen) == 32  # bn1, bn2 and bn3 of 16 blocks
    assert all(re.search(r"layer\d\.\d\.bn[12]\.weight", name) for name in chosen)


def test_where_mobilenet_gets_its_gates() -> None:
    from torchvision.models import mobilenet_v2

    recipe = load_recipe("imagenet-mobilenet_v2")
    model = mobilenet_v2()
    example = torch.zeros(1, 3, 64, 64)
    pf.add_gates(model, example, where=recipe.sparsity.gates, residual=recipe.sparsity.residual)
    scales = pf.scaling_factors(model, example, residual=recipe.sparsity.residual)
    gates = [name for name in scales if "gate" in name]
    assert len(gates) == 33  # 16 expansions and 17 projections, as the paper prunes
    assert all(bool((scales[name] == 1).all()) for name in gates)


def test_mobilenets_other_norms_are_not_clamped_as_gates(tmp_path: Path) -> None:
    recipe = load_recipe("imagenet-mobilenet_v2")
    images = SimpleNamespace(classes=10, image_shape=(3, 64, 64), example=images_of_zeros)
    networks = Networks(recipe, cast(Any, images), Artifacts(tmp_path), torch.device("cpu"))
    model, scales = networks.fresh()
    assert all(name.endswith(".gate") for name in [*scales, *scales.others])
    with torch.no_grad():
        model.features[18][1].weight.fill_(1.5)
    reg = pf.Polarization(1e-4, 1.0, clamp=recipe.sparsity.clamp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    pf.step(optimizer, scales, reg)
    assert bool((model.features[18][1].weight == 1.5).all())


def images_of_zeros(count: int = 1) -> torch.Tensor:
    return torch.zeros(count, 3, 64, 64)
