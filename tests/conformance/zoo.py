"""Networks as other packages build them, from configurations and with random weights; nothing is
downloaded. `make test-zoo` installs the packages (requirements-zoo.txt) and runs these.

What packages do after their networks (decoding of boxes, losses) is theirs; what is taken here is
what one would train.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .case import CLASSES, Case, of

#: Frames × features of spectrograms.
SPEECH, LONGER = (60, 24), (90, 24)


def _yolo(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tasks = of("ultralytics", ".nn.tasks")
        return tasks.DetectionModel(f"{name}.yaml", nc=CLASSES, verbose=False)

    return build


def _segmentation(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        make = getattr(of("segmentation_models_pytorch"), name)
        return make("resnet18", encoder_weights=None, classes=CLASSES)

    return build


def _transformers(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = of("transformers")
        config = getattr(package, f"{name}Config")(num_labels=CLASSES, **settings)
        head = "SemanticSegmentation" if name == "Segformer" else "ImageClassification"
        return getattr(package, f"{name}For{head}")(config)

    return build


def timm(name: str) -> Callable[[], nn.Module]:
    """One of timm's networks."""

    def build() -> nn.Module:
        return of("timm").create_model(name, pretrained=False, num_classes=CLASSES)

    return build


def _facenet() -> nn.Module:
    return of("facenet_pytorch").InceptionResnetV1(pretrained=None)


class WholeLength(nn.Module):
    """A network that is told how much of each input counts: all of it. (Its own default for this
    is in float32, which the suite is not.)"""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, x.new_ones(len(x)))


def _xvector() -> nn.Module:
    return of("speechbrain", ".lobes.models.Xvector").Xvector(in_channels=SPEECH[1])


def _ecapa() -> nn.Module:
    ecapa = of("speechbrain", ".lobes.models.ECAPA_TDNN").ECAPA_TDNN
    network = ecapa(SPEECH[1], channels=[64] * 4 + [192], attention_channels=32, lin_neurons=32)
    return WholeLength(network)


def _monai() -> nn.Module:
    return of("monai", ".networks.nets").UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=CLASSES,
        channels=(16, 32, 64),
        strides=(2, 2),
        num_res_units=2,
        norm="batch",
    )


def _osnet() -> nn.Module:
    return of("torchreid", ".reid.models.osnet").osnet_x1_0(num_classes=CLASSES, pretrained=False)


def _effdet() -> nn.Module:
    package = of("effdet")
    config = package.get_efficientdet_config("tf_efficientdet_d0")
    config.num_classes, config.image_size = CLASSES, [128, 128]
    return package.EfficientDet(config, pretrained_backbone=False)


#: Where the package's own default is a large network: the settings of its smallest.
SMALLEST: dict[str, dict[str, Any]] = {
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
}
TRANSFORMERS = "ResNet RegNet MobileNetV1 MobileNetV2 MobileViT MobileViTV2 EfficientNet Segformer"
TIMM = (
    "resnetblur18 dpn48b res2net50_26w_4s mobilevit_xxs mobilevitv2_050 efficientformer_l1 "
    "efficientformerv2_s0 levit_128s"
)
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{f"ultralytics/{name}": _yolo(name) for name in ("yolov8n", "yolo11n")},
    **{
        f"segmentation_models_pytorch/{name}": _segmentation(name)
        for name in ("Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus")
    },
    **{
        f"transformers/{name}": _transformers(name, **SMALLEST.get(name, {}))
        for name in TRANSFORMERS.split()
    },
    "facenet_pytorch/InceptionResnetV1": _facenet,
    "speechbrain/Xvector": _xvector,
    "speechbrain/ECAPA_TDNN": _ecapa,
    "monai/UNet": _monai,
    "torchreid/osnet_x1_0": _osnet,
    "effdet/tf_efficientdet_d0": _effdet,
    **{f"timm/{name}": timm(name) for name in TIMM.split()},
}
#: Of one input, and of one of another size; None where a network is made for one size.
Sizes = tuple[tuple[int, ...], tuple[int, ...] | None]
USUAL: Sizes = ((3, 64, 64), (3, 96, 128))
SIZES: dict[str, Sizes] = {
    "facenet_pytorch/InceptionResnetV1": ((3, 96, 96), (3, 112, 128)),
    "speechbrain/Xvector": (SPEECH, LONGER),
    "speechbrain/ECAPA_TDNN": (SPEECH, LONGER),
    "monai/UNet": ((1, 16, 16, 16), (1, 24, 16, 32)),
    "torchreid/osnet_x1_0": ((3, 64, 32), (3, 96, 64)),
    "effdet/tf_efficientdet_d0": ((3, 128, 128), None),
    "timm/efficientformer_l1": ((3, 224, 224), None),
    "timm/efficientformerv2_s0": ((3, 224, 224), None),
    "timm/levit_128s": ((3, 224, 224), None),
}
#: Nothing in them keeps a β from being folded exactly: no depthwise convolutions, no gates.
EXACT = (
    "ultralytics/yolov8n segmentation_models_pytorch/Unet "
    "segmentation_models_pytorch/UnetPlusPlus segmentation_models_pytorch/FPN "
    "transformers/ResNet transformers/Segformer facenet_pytorch/InceptionResnetV1 "
    "speechbrain/Xvector monai/UNet timm/resnetblur18 timm/dpn48b timm/res2net50_26w_4s "
    "timm/efficientformer_l1 timm/levit_128s"
).split()

ZOO = {
    name: Case(name, build, name in EXACT, *SIZES.get(name, USUAL))
    for name, build in BUILDERS.items()
}
