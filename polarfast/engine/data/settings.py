"""The ``data:`` block of a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import ArgumentError
from ..ranges import MANY, MOST_SEED, check_ranges

CROP_FLIP_PAD = 4  # pixels, the usual choice for CIFAR
RESIZED_CROP_SIZE = 224  # pixels, the usual choice for ImageNet


@dataclass(frozen=True)
class Data:
    """Which images, how they are varied, and where they are kept.

    Attributes:
        name: "digits" comes with scikit-learn; the others are read from ``root``: "cifar10",
            "cifar100", "mnist" and "fashion-mnist" in the layout that torchvision unpacks to;
            "folder" is any ``train/<class>/*.jpg`` with ``val/<class>/`` or ``test/<class>/``
            beside it, ImageNet among them.
        root: folder with the files; not used by "digits".
        augment: how training images are varied. "shift" moves each by at most ``shift`` pixels,
            the border filled with black; "crop-flip" does so too (4 pixels unless ``shift`` says
            otherwise) and mirrors half of them, as is usual for CIFAR; "resized-crop-flip" cuts
            out 8 to 100 % of the area and mirrors half of them, as is usual for ImageNet.
        shift: pixels, for "shift" and "crop-flip".
        image_size: side in pixels that images are resized and cropped to; 0 leaves them as stored
            (224 for "resized-crop-flip", 16 for "digits").
        train_images: use so many of the training images only, the same number of each class as far
            as there are enough; 0 uses all. A larger choice holds every smaller one.
        test_images: likewise of the images that the model is tested on.
        validation: share of the training images of each class that is held out and takes the place
            of the test set, which is then not read at all.
        split_seed: of ``train_images``, ``test_images``, ``validation`` and of the split of digits.
        keep: "device" decodes all images once and keeps them on the training device, "stream" reads
            them again each epoch in worker processes; "auto" keeps what takes 1 GiB or less and
            streams the rest, and whatever "resized-crop-flip" is to cut from.
        workers: processes that decode streamed images; 0 decodes in the training process.
        loader: "dali" decodes folders of images on the GPU with NVIDIA DALI.
        skip_bad_images: leave out images that cannot be read, and count them, instead of stopping.
    """

    name: Literal["digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "folder"]
    root: str = "data"
    augment: Literal["none", "shift", "crop-flip", "resized-crop-flip"] = "none"
    shift: int = 0
    image_size: int = 0
    train_images: int = 0
    test_images: int = 0
    validation: float = 0.0
    split_seed: int = 0
    keep: Literal["auto", "device", "stream"] = "auto"
    workers: int = 4
    loader: Literal["torch", "dali"] = "torch"
    skip_bad_images: bool = False

    def __post_init__(self) -> None:
        for name in ("shift", "image_size", "train_images", "test_images", "workers"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"data.{name}={getattr(self, name)}: must not be negative")
        sides = {"shift": (0, 4096), "image_size": (0, 512 if self.name == "digits" else 4096)}
        counts = {"train_images": (0, MANY), "test_images": (0, MANY), "workers": (0, 1024)}
        check_ranges(self, "data.", **sides, **counts, split_seed=(0, MOST_SEED))
        if not 0 <= self.validation < 1:
            raise ArgumentError(
                f"data.validation={self.validation}: must be a share of the training images in "
                "[0, 1)"
            )
        self._check_augment()
        self._check_keep()

    def _check_augment(self) -> None:
        if self.augment == "shift" and self.shift == 0:
            raise ArgumentError(
                "data.augment=shift: moves nothing while data.shift is 0; give the largest shift "
                "in pixels, or augment: none"
            )
        if self.shift and self.augment not in ("shift", "crop-flip"):
            raise ArgumentError(
                f"data.shift={self.shift}: has no effect with augment: {self.augment}; choose "
                "'shift' or 'crop-flip', or leave it 0"
            )

    def _check_keep(self) -> None:
        cuts = self.augment == "resized-crop-flip"
        if self.name == "digits" and (cuts or self.keep == "stream"):
            raise ArgumentError(
                "data.name=digits: always kept on the device; it goes neither with keep: stream "
                "nor with augment: resized-crop-flip"
            )
        if cuts and self.keep == "device":
            raise ArgumentError(
                "data.keep=device: augment: resized-crop-flip cuts its crops from the images as "
                "stored, which are of all sizes; choose keep: stream or auto"
            )
        if self.loader == "dali":
            self._check_dali()

    def _check_dali(self) -> None:
        fits = self.name == "folder" and self.keep != "device"
        if not fits or self.augment not in ("none", "resized-crop-flip") or self.side == 0:
            raise ArgumentError(
                "data.loader=dali: streams an image folder at one size; it goes with name: folder, "
                "keep: auto or stream, augment: resized-crop-flip, or none with an image_size"
            )
        if self.skip_bad_images:
            raise ArgumentError(
                "data.loader=dali: fails on a bad image, so skip_bad_images must be off; use "
                "loader: torch, or remove the images that it names"
            )

    @property
    def title(self) -> str:
        """The data set for people: its name, or that of its folder."""
        return f"folder '{Path(self.root).name}'" if self.name == "folder" else self.name

    @property
    def pad(self) -> int:
        """Largest shift of a training image in pixels, either way."""
        return self.shift or (CROP_FLIP_PAD if self.augment == "crop-flip" else 0)

    @property
    def side(self) -> int:
        """Side of the square that images are brought to, in pixels; 0: as stored."""
        if self.image_size == 0 and self.augment == "resized-crop-flip":
            return RESIZED_CROP_SIZE
        return self.image_size
