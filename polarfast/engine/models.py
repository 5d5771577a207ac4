"""Networks by name: the paper's for CIFAR, and torchvision's; weights to start from."""

import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..archives import read_tensors
from ..errors import ArgumentError, FileFormatError

TORCHVISION = "torchvision/"
#: Widths of the convolutions between two poolings (Simonyan and Zisserman 2015, A and D).
VGG11_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions on a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra_channels = channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel, with zeros for the channels that are new, half on either side."""
        if self.stride == 1 and self.extra_channels == 0:
            return x
        before = self.extra_channels // 2
        sliced = x[:, :, :: self.stride, :: self.stride]
        return F.pad(sliced, (0, 0, 0, 0, before, self.extra_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks, 16, 32 and 64 channels.

    Args:
        depth: 20, 32, 44, 56, 110, ...
        classes: number of logits.
        in_channels: channels of the input image.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, classes]``.

    Raises:
        ArgumentError: depth is not of the form 6n + 2.
    """

    def __init__(self, depth: int, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ArgumentError(f"resnet depth={depth}: must be 6n + 2, e.g. 20, 32, 56 or 110")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, classes)
        initialize(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Vgg(nn.Module):
    """VGG with BatchNorm and one hidden linear layer, for 32x32 images.

    Five stages of 3x3 convolutions with max-pooling between them (the last one averages), then
    linear 512 - BatchNorm - ReLU - linear.

    Args:
        stages: widths of each stage's convolutions.
        width: share of all widths, the hidden layer's too.

    Shape:
        ``[N, in_channels, H, W]`` with H, W multiples of 16, to ``[N, classes]``.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, stage in enumerate(stages):
            if number:
                layers.append(nn.MaxPool2d(2))
            for channels in (int(width * each) for each in stage):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
        self.features = nn.Sequential(*layers)
        hidden = int(width * 512)
        self.classifier = nn.Sequential(
            nn.Linear(in_channels, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


def initialize(model: nn.Module) -> None:
    """Kaiming-normal convolutions and linear layers, zero linear biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resnet(depth: int, classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """A CIFAR ResNet of the given depth (6n + 2), option-A shortcuts."""
    return CifarResNet(depth, classes, in_channels)


def vgg16_bn(classes: int = 10, in_channels: int = 3) -> Vgg:
    """VGG-16 with BatchNorm and one hidden 512-wide linear layer."""
    return Vgg(VGG16_STAGES, classes, in_channels)


def vgg11_half(classes: int = 10, in_channels: int = 3) -> Vgg:
    """VGG-11 with BatchNorm, every layer half as wide: for experiments on a CPU."""
    return Vgg(VGG11_STAGES, classes, in_channels, width=0.5)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in (8, 20, 32, 44, 56, 110)},
    "vgg11-half": vgg11_half,
    "vgg16": vgg16_bn,
}


def build(name: str, classes: int, in_channels: int) -> nn.Module:
    """The network called ``name`` in recipes and on the command line, with fresh weights.

    Args:
        name: one of ``MODELS``, or "torchvision/resnet50" and the like.

    Raises:
        ArgumentError: no such network, or it cannot take these images.
    """
    if name.startswith(TORCHVISION):
        return _torchvision(name, classes, in_channels)
    try:
        constructor = MODELS[name]
    except KeyError:
        known = ", ".join(MODELS)
        raise ArgumentError(
            f"model '{name}' is not known; choose one of {known}, or {TORCHVISION}NAME"
        ) from None
    return constructor(classes, in_channels)


def _torchvision(name: str, classes: int, in_channels: int) -> nn.Module:
    from torchvision import models

    if in_channels != 3:
        raise ArgumentError(f"model '{name}' takes colour images, not {in_channels} channel(s)")
    try:
        return models.get_model(name.removeprefix(TORCHVISION), weights=None, num_classes=classes)
    except ValueError:
        known = ", ".join(models.list_models(module=models)[:6])
        raise ArgumentError(
            f"model '{name}' is not one of torchvision's classifiers ({known}, ...)"
        ) from None


def _of_another_kind(path: str, refused: FileFormatError) -> Any:
    """What torch itself reads, without running code, of a file that holds more than tensors and
    plain data, or is of a format without checksums.

    Raises:
        FileFormatError: `refused`, where the file is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise refused
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # torch raises half a dozen unrelated types
        raise refused from error
    warnings.warn(
        f"weights='{path}' were read by torch alone, which does not find all damage: {refused}",
        stacklevel=3,
    )
    return state


def load_weights(model: nn.Module, path: str) -> None:
    """Start from a file of weights: a state dict, alone or under "model" or "state_dict".

    Raises:
        ArgumentError: the file is missing, or its tensors are not this model's.
        FileFormatError: the file cannot be read without running code.
    """
    try:
        state = read_tensors(path, "save a plain state dict with torch.save")
    except FileNotFoundError:
        raise ArgumentError(f"weights='{path}': there is no such file") from None
    except FileFormatError as error:
        state = _of_another_kind(path, error)
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArgumentError(f"weights='{path}': holds no state dict (names and their tensors)")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArgumentError(f"weights='{path}' do not fit the model: {error}") from error
