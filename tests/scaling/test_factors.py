"""Which γ take part, by the paper's rules, on the paper's networks."""

import copy
import itertools
import pickle

import pytest
import torch
from support.nets import Bottlenecks, Residual, chain

import polarfast as pf
from polarfast.engine.models import resnet, vgg16_bn
from polarfast.scaling.factors import ScalingFactors

CIFAR = torch.randn(1, 3, 32, 32)
SMALL = torch.randn(2, 3, 10, 10)


def test_vgg_every_norm_takes_part():
    model = vgg16_bn()
    scales = pf.scaling_factors(model, CIFAR)
    norms = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d))
    ]
    assert list(scales) == norms and not scales.pinned
    assert scales.numel() == 64 * 2 + 128 * 2 + 256 * 3 + 512 * 6 + 512


@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
def test_cifar_resnet(residual):
    model = resnet(56)
    scales = pf.scaling_factors(model, CIFAR, residual=residual)
    names = {name for name, _ in model.named_parameters() if name.startswith("layer")}
    wanted = {n for n in names if n.endswith("bn1.weight")}
    if residual != "keep":
        wanted |= {n for n in names if n.endswith("bn2.weight")}
    if residual == "couple":
        wanted.add("bn1.weight")
    assert set(scales) == wanted
    assert set(scales.pinned) == {n for n in names if n.endswith("bn2.weight")} - wanted | (
        {"bn1.weight"} - wanted
    )


@pytest.mark.slow
def test_resnet50_and_mobilenet():
    models = pytest.importorskip("torchvision").models
    image = torch.randn(1, 3, 64, 64)
    model = models.resnet50()
    scales = pf.scaling_factors(model, image, residual="expand")
    assert set(scales) == {
        n
        for n, _ in model.named_parameters()
        if n.startswith("layer") and ".bn" in n and "weight" in n
    }
    assert {"bn1.weight", "layer1.0.downsample.1.weight"} <= set(scales.pinned)
    assert scales.numel() == 22656
    regularized = scales.select(r"bn[12]")
    assert regularized.numel() == 22656 - sum(
        param.numel() for name, param in scales.items() if "bn3" in name
    )
    assert set(regularized.others) == set(scales.others) | {n for n in scales if "bn3" in n}

    model = models.mobilenet_v2()
    scales = pf.scaling_factors(model, image, residual="expand")
    modules = list(model.named_modules())
    depthwise = {
        f"{norm}.weight"
        for (_, conv), (norm, _) in itertools.pairwise(modules)
        if isinstance(conv, torch.nn.Conv2d) and conv.groups > 1
    }
    assert len(depthwise) == 17 and not depthwise & set(scales)
    assert "features.2.conv.0.1.weight" in scales  # an expansion
    assert "features.3.conv.3.weight" in scales  # a projection that ends a branch
    assert "features.2.conv.1.1.weight" in scales.pinned
    assert "depthwise" in scales.pinned["features.2.conv.1.1.weight"]


def test_small_nets_by_hand():
    keep = pf.scaling_factors(Residual(), SMALL)
    assert list(keep) == ["first.1.weight", "second.1.weight"]
    expand = pf.scaling_factors(Residual(), SMALL, residual="expand")
    assert list(expand) == [
        "first.1.weight",
        "first.4.weight",
        "second.1.weight",
        "second.4.weight",
    ]
    couple = pf.scaling_factors(Residual(), SMALL, residual="couple")
    assert set(couple) == {*expand, "stem.1.weight", "down.1.weight"}
    assert list(pf.scaling_factors(Bottlenecks(), SMALL, residual="expand")) == [
        "block.1.weight",
        "block.7.weight",
    ]


def test_selection_and_first_values():
    model = chain()
    scales = pf.scaling_factors(model, SMALL)
    assert len(scales) == 2 and scales.numel() == 20
    assert scales["1.weight"] is model[1].weight
    pf.init_scales(scales, 0.25)
    assert all(bool((gamma == 0.25).all()) for gamma in scales.values())
    assert list(scales.select("^4")) == ["4.weight"]
    assert "2 layers, 20 channels" in repr(scales)
    with pytest.raises(pf.ArgumentError, match="pattern='bn'.*names look like: 1.weight"):
        scales.select("bn")
    with pytest.raises(pf.ArgumentError, match="regular expression"):
        scales.select("(")
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(pf.ArgumentError, match="value="):
            pf.init_scales(scales, value)
    pf.thresholds(scales)  # from now on they hold an address table, which cannot be copied
    for again in (copy.deepcopy(scales), pickle.loads(pickle.dumps(scales))):
        assert pf.thresholds(again) == pf.thresholds(scales)
        assert again["1.weight"] is not scales["1.weight"]
    with pytest.raises(pf.ArgumentError, match="residual"):
        ScalingFactors({}, residual="drop")
