"""The networks: torchvision's and timm's, with random weights and small inputs.

Detectors are taken without anchors and non-maximum suppression, where no channels are left: their
backbone and their heads.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from .case import CLASSES, Case, of
from .zoo import ZOO, timm

#: Cheap ones of each family: what is run where nothing else is asked for.
FAST = (
    "resnet18|resnext50_32x4d|densenet121|googlenet|inception_v3|mobilenet_v2|mobilenet_v3_small|"
    "efficientnet_b0|regnet_y_400mf|shufflenet_v2_x0_5|ssdlite320_mobilenet_v3_large|"
    "timm/resnetv2_50|timm/mobilenetv4_conv_small"
)
SMALLEST = "shufflenet_v2_x0_5"


class DenseDetector(nn.Module):
    """A detector's backbone and the convolutional heads on its feature maps."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return features, self.head(list(features.values()))


def _classifier(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return getattr(_torchvision("models"), name)(num_classes=CLASSES, **extra)

    return build


def _segmentation(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        make = getattr(_torchvision("models.segmentation"), name)
        return make(weights=None, weights_backbone=None, num_classes=CLASSES, **settings)

    return build


def _detector(name: str, head: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        make = getattr(_torchvision("models.detection"), name)
        whole = make(weights=None, weights_backbone=None, num_classes=CLASSES)
        return DenseDetector(whole.backbone, whole.get_submodule(head))

    return build


def _torchvision(module: str) -> Any:
    return of("torchvision", f".{module}")


EXACT = (
    "vgg11_bn vgg13_bn vgg16_bn vgg19_bn resnet18 resnet34 resnet50 resnet101 resnet152 "
    "wide_resnet50_2 resnext50_32x4d densenet121 densenet169 densenet201 googlenet inception_v3 "
    "regnet_x_400mf"
)
MEASURED = (
    "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 efficientnet_b0 "
    "efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 "
    "efficientnet_b6 efficientnet_b7 efficientnet_v2_s regnet_y_400mf shufflenet_v2_x0_5 "
    "shufflenet_v2_x1_0"
)
TIMM_EXACT = "resnet26 resnetv2_50 vovnet39a darknet53 dla34 hrnet_w18_small cspresnet50"
TIMM_MEASURED = (
    "mobilenetv4_conv_small efficientnet_lite0 regnety_002 ghostnet_100 seresnet50 rexnet_100 "
    "ese_vovnet19b_dw repvgg_a0 skresnet18 mobileone_s0 fbnetc_100 tinynet_e lcnet_050 "
    "hardcorenas_a"
)
#: Every channel meets others in an addition.
COUPLED = ("timm/repvgg_a0", "timm/mobileone_s0")


def _all() -> dict[str, Case]:
    cases = [Case(name, _classifier(name), True) for name in EXACT.split()]
    cases += [Case(name, _classifier(name), False) for name in MEASURED.split()]
    cases += [
        Case("fcn_resnet50", _segmentation("fcn_resnet50", aux_loss=True), True),
        Case(
            "deeplabv3_mobilenet_v3_large",
            _segmentation("deeplabv3_mobilenet_v3_large", aux_loss=True),
            False,
        ),
        Case("lraspp_mobilenet_v3_large", _segmentation("lraspp_mobilenet_v3_large"), False),
        Case(
            "ssdlite320_mobilenet_v3_large",
            _detector("ssdlite320_mobilenet_v3_large", "head"),
            False,
        ),
        Case(
            "fasterrcnn_mobilenet_v3_large_fpn",
            _detector("fasterrcnn_mobilenet_v3_large_fpn", "rpn.head"),
            False,
        ),
    ]
    cases += [Case(f"timm/{name}", timm(name), True) for name in TIMM_EXACT.split()]
    cases += [Case(f"timm/{name}", timm(name), False) for name in TIMM_MEASURED.split()]
    special: dict[str, dict[str, Any]] = {name: {"modes": ("couple",)} for name in COUPLED}
    special["inception_v3"] = {"shape": (3, 128, 128), "other": (3, 144, 160)}
    return {case.name: replace(case, **special.get(case.name, {})) for case in cases}


ALL = _all()


def chosen(models: str) -> list[Case]:
    """The networks whose whole name matches a regular expression, or "all", or the "fast" ones, or
    the other packages' ("zoo").
    """
    if models in ("all", "zoo"):
        return list((ALL if models == "all" else ZOO).values())
    pattern, known = FAST if models == "fast" else models, ALL | ZOO
    found = [case for case in known.values() if re.fullmatch(pattern, case.name)]
    if not found:
        raise ValueError(f"--models {models!r} matches none of {', '.join(known)}")
    return found


def parameters(cases: list[Case]) -> list[Any]:
    """As tests take them: all but the smallest are slow."""
    slow = {case.name: (pytest.mark.slow,) for case in cases if case.name != SMALLEST}
    return [pytest.param(case, id=case.name, marks=slow.get(case.name, ())) for case in cases]
