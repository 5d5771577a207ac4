"""Small image sets, decoded once and kept whole on the training device; augmented there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polarfast.errors import ArgumentError

DIGITS_TRAIN = 1000  # of the 1,797 images; the other 797 are the test set


@dataclass(frozen=True)
class Images:
    """Normalized float32 images ``[N, C, H, W]`` and int64 labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """A training and a test set on one device.

    Attributes:
        background: the normalized value that fills the border when an image is shifted.
    """

    name: str
    train: Images
    test: Images
    classes: int
    background: float

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def digits(device: torch.device, test_seed: int = 0) -> DataSet:
    """scikit-learn's bundled handwritten digits: 1,797 images of 8x8, enlarged to 16x16.

    The enlargement leaves a ResNet's last stage 4x4 pixels instead of 2x2. 1,000 images drawn with
    ``test_seed`` train, the other 797 test.
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(test_seed))
    images, labels = images[order], torch.from_numpy(bundled.target).long()[order]
    mean, std = images[:DIGITS_TRAIN].mean(), images[:DIGITS_TRAIN].std()
    images = ((images - mean) / std).to(device)
    labels = labels.to(device)
    return DataSet(
        name="digits",
        train=Images(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN]),
        test=Images(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
        classes=10,
        background=float(-mean / std),
    )


DATA_SETS: dict[str, Callable[[torch.device, int], DataSet]] = {"digits": digits}


def load(name: str, device: torch.device, test_seed: int = 0) -> DataSet:
    """The data set called ``name`` in recipes and on the command line."""
    if name not in DATA_SETS:
        known = ", ".join(sorted(DATA_SETS))
        raise ArgumentError(f"data set '{name}' is not known; choose one of {known}")
    return DATA_SETS[name](device, test_seed)


def random_shift(images: Tensor, pixels: int, fill: float, generator: torch.Generator) -> Tensor:
    """Move each image by its own random whole number of pixels, at most ``pixels`` either way.

    Args:
        images: ``[N, C, H, W]``.
        fill: value of the pixels that come in from outside.
        generator: on the images' device.
    """
    if pixels == 0:
        return images
    count, channels, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, value=fill)
    device, offsets = images.device, 2 * pixels + 1
    rows = torch.randint(offsets, (count, 1, 1, 1), generator=generator, device=device)
    columns = torch.randint(offsets, (count, 1, 1, 1), generator=generator, device=device)
    rows = rows + torch.arange(height, device=device)[:, None]
    columns = columns + torch.arange(width, device=device)
    each = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[each, channel, rows, columns]


def batches(
    data: DataSet, batch_size: int, shift: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, shifted training batches; what does not fill a batch is left out."""
    train = data.train
    order = torch.randperm(len(train), generator=generator, device=train.images.device)
    for start in range(0, len(train) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        images = random_shift(train.images[chosen], shift, data.background, generator)
        yield images, train.labels[chosen]
