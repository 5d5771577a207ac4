"""What a training loop sees of a data set, and how one is loaded."""

import logging
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ArgumentError
from .batches import IMAGENET, Transform, as_stored, fit, measured
from .decode import decode, probe
from .memory import MemorySource
from .plan import EpochPlan
from .reading import Parts, check_classes, read_parts
from .settings import Data
from .stream import StreamSource

_log = logging.getLogger(__name__)

KEEP_BYTES = 1 << 30  # keep="auto" keeps sets up to this size, training and test images together
IMAGENET_SIDE = 64  # folders of images of this side or larger are normalized as ImageNet is


class DataSource(Protocol):
    """Training and test images of one data set, on one device.

    Attributes:
        image_shape: channels, height, width.
        train_size, test_size: numbers of images; bad images that are skipped while streaming still
            count.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    train_size: int
    test_size: int

    @property
    def bad_images(self) -> int:
        """How many unreadable images this process has skipped so far."""
        ...

    def train(self, plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch's micro-batches for this process: ``plan.shard_count`` a step, in order.

        Yields normalized float32 images ``[b, C, H, W]`` and int64 labels ``[b]`` on the device;
        ``b`` is ``plan.batch_size / plan.shards``. Images that fill no batch are left out.
        """
        ...

    def test(
        self, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the test images, unvaried; over all ranks, each image once."""
        ...

    def example(self, count: int = 1) -> Tensor:
        """The first ``count`` test images, normalized, on the device."""
        ...


def load(data: Data, device: torch.device) -> DataSource:
    """Open a data set; small ones are decoded here and moved to ``device``.

    Images are normalized channel by channel: CIFAR, MNIST and Fashion-MNIST with the constants in
    common use, image folders with those of ImageNet where images have 64 pixels or more a side, or
    are streamed, and everything else with mean and standard deviation of its training images.

    Raises:
        ArgumentError: a file is missing or damaged, the folders do not fit together, or a setting
            does not fit what is in them; the message names the file or setting.
    """
    parts = read_parts(data)
    view = as_stored if data.name == "digits" else fit(data)
    shape = probe(parts.train, view, data.skip_bad_images)
    if data.shift >= min(shape[1:]):
        raise ArgumentError(
            f"data.shift={data.shift}: images have {shape[1]}x{shape[2]} pixels, and one that is "
            "moved so far is gone; choose a shift of some pixels"
        )
    if data.loader == "torch" and _keeps(data, parts, shape):
        return _keep(data, parts, view, shape, device)
    normalize = parts.normalization or IMAGENET
    return StreamSource(data, parts, shape, normalize, device)


def _keeps(data: Data, parts: Parts, shape: tuple[int, int, int]) -> bool:
    if data.keep == "auto" and data.augment != "resized-crop-flip":
        return (len(parts.train) + len(parts.test)) * math.prod(shape) <= KEEP_BYTES
    return data.keep == "device"


def _keep(
    data: Data, parts: Parts, view: Transform, shape: tuple[int, int, int], device: torch.device
) -> MemorySource:
    train, bad = decode(parts.train, view, shape, data.skip_bad_images)
    test, bad_test = decode(parts.test, view, shape, data.skip_bad_images)
    bad += bad_test
    if bad:
        _log.warning("%d images are left out; the first: %s", len(bad), bad[0])
    check_classes(train, parts.class_names)
    if parts.normalization is not None:
        normalize = parts.normalization
    elif min(shape[1:]) >= IMAGENET_SIDE:
        normalize = IMAGENET
    else:
        normalize = measured(train.pixels)
    classes = len(parts.class_names)
    return MemorySource(data, classes, train, test, normalize, device, len(bad))
