"""Slim networks to be exported: between them they have everything that a slim model may have and
plain torch has not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import resnet as cifar_resnet
from polarfast.engine.models import vgg16_bn
from support.nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    chain,
    conv_bn,
    empty,
    settle,
    zero,
)

DYNAMIC = torch.export.Dim.DYNAMIC


@dataclass(frozen=True)
class Case:
    """How a slim network is made.

    Attributes:
        build: the original network.
        residual: mode of the plan.
        emptied: layers that lose all their channels.
        gates: prune by gates in place of γ.
        size: height and width of the example image.
        any_size: the network takes images of other sizes too.
        has: what the slim network must have, for the test to be one of it.
    """

    build: Callable[[], nn.Module]
    residual: str = "keep"
    emptied: tuple[str, ...] = ()
    gates: bool = False
    size: int = 10
    any_size: bool = True
    has: tuple[str, ...] = ()

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Three shapes of a batch; the first is that of the example."""
        n = self.size
        if not self.any_size:
            return [(2, 3, n, n), (1, 3, n, n), (5, 3, n, n)]
        return [(2, 3, n, n), (1, 3, 2 * n, n), (5, 3, n + 4, n + 2)]

    def dynamic(self) -> dict[int, object]:
        """The dimensions that are not fixed in an export."""
        return {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC} if self.any_size else {0: DYNAMIC}


def without_biases() -> nn.Module:
    """Readers that have no bias to take up a constant."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)]
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(
        *conv_bn(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.ReLU(), norm, *head
    )


def resnet(block: str) -> nn.Module:
    """torchvision's, one block to a stage."""
    models = pytest.importorskip("torchvision.models.resnet")
    return models.ResNet(getattr(models, block), [1, 1, 1, 1], num_classes=10)


def inverted_residuals() -> nn.Module:
    """MobileNetV2, its first stages."""
    models = pytest.importorskip("torchvision").models
    stages = [[1, 16, 1, 1], [6, 24, 2, 2]]
    return models.MobileNetV2(num_classes=10, inverted_residual_setting=stages)


CASES = {
    # Adaptive pooling to 2x2: torch exports it to ONNX for one size of image.
    "chain": Case(chain, any_size=False, has=("constant",)),
    "created biases": Case(without_biases, has=("bias",)),
    "keep": Case(Residual, has=("constant",)),
    "expand": Case(Residual, "expand", has=("put back", "constant")),
    "couple": Case(Residual, "couple", has=("constant",)),
    "emptied branch": Case(Residual, "expand", ("first.4.weight",), has=("put back", "silent")),
    "gates": Case(Bottlenecks, "expand", gates=True, has=("put back",)),
    "branches": Case(Branches),
    "grouped": Case(Grouped),
    "squeeze-excite": Case(SqueezeExcite),
    "option A": Case(
        lambda: cifar_resnet(8), "expand", ("layer1.0.bn2.weight",), size=16,
        has=("put back", "silent"),
    ),
    "vgg": Case(vgg16_bn, size=32),
    "basic blocks": Case(lambda: resnet("BasicBlock"), "expand", size=64, has=("put back",)),
    "bottlenecks": Case(lambda: resnet("Bottleneck"), "expand", size=64, has=("put back",)),
    "mobilenet": Case(inverted_residuals, "expand", gates=True, size=32, has=("put back",)),
}  # fmt: skip


@cache
def original(name: str) -> tuple[nn.Module, pf.PruningPlan]:
    """The network of a case before it is made slim, in float64 and eval mode, and its plan."""
    case = CASES[name]
    torch.manual_seed(0)
    model = settle(case.build(), torch.randn(4, 3, case.size, case.size))
    x = torch.randn(2, 3, case.size, case.size, dtype=torch.float64)
    choose = pf.add_gates if case.gates else pf.scaling_factors
    scales = choose(model, x, residual=case.residual)
    zero(scales)
    empty(scales, case.emptied)
    return model, pf.plan(model, x, scales)


@cache
def make(name: str) -> tuple[nn.Module, pf.PruningPlan]:
    """The slim network of a case, in float64 and eval mode, and its plan."""
    model, plan = original(name)
    slim = pf.slim(model, plan)
    missing = {*CASES[name].has} - features(slim, plan)
    assert not missing, f"{name} has no {missing}"
    return slim, plan


def features(slim: nn.Module, plan: pf.PruningPlan) -> set[str]:
    """What a slim model has and plain torch has not."""
    changes = slim.polarfast_info.structure.modules.values()
    found = {
        "constant": any(len(layer.constant) for layer in plan.layers.values()),
        "bias": any(change.bias for change in changes),
        "put back": any(change.put_back is not None for change in changes),
        "silent": any(change.silent for change in changes),
    }
    return {name for name, there in found.items() if there}


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest output."""
    assert found.shape == expected.shape
    difference = (found.double() - expected).abs().max() / expected.abs().max()
    return difference.item()
