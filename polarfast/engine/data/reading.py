"""Find a data set's images, then split and cut it down as the settings say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import ArgumentError
from .batches import NORMALIZATIONS, Normalization
from .decode import Images
from .formats import cifar, digits, folder, mnist
from .plan import balanced_subset, hold_out
from .settings import Data

_CIFAR = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
_MNIST = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # name -> folder


@dataclass(frozen=True)
class Parts:
    """The images to train on and to test on, not decoded yet where they are files.

    Attributes:
        class_names: one for each label.
        normalization: the data set's own; None where it depends on the images.
    """

    train: Images
    test: Images
    class_names: list[str]
    normalization: Normalization | None


def read_parts(data: Data) -> Parts:
    """Read or list the files; nothing is decoded that the settings leave out.

    Raises:
        ArgumentError: a file or folder is missing or damaged, or there are too few images.
    """
    train, read_test, names, own = _open(data)
    if data.validation:
        staying, held = hold_out(train.labels, data.validation, data.split_seed)
        train, test = train.pick(staying), train.pick(held)
    else:
        test = read_test()
    seed = data.split_seed
    if data.train_images:
        if data.train_images < len(names):
            raise ArgumentError(
                f"data.train_images={data.train_images}: fewer than the {len(names)} classes"
            )
        train = train.pick(balanced_subset(train.labels, data.train_images, seed, "train_images"))
    if data.test_images:
        test = test.pick(balanced_subset(test.labels, data.test_images, seed, "test_images"))
    check_classes(train, names)
    return Parts(train, test, names, own)


def check_classes(train: Images, names: list[str]) -> None:
    """Refuse a training set in which a class has no image."""
    counts = torch.bincount(train.labels.cpu(), minlength=len(names))
    if int(counts.min()) == 0:
        missing = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
        raise ArgumentError(
            f"no training image of class {', '.join(missing[:5])} ({len(missing)} of {len(names)} "
            "classes have none); add some or remove the class"
        )


def _open(data: Data) -> tuple[Images, Callable[[], Images], list[str], Normalization | None]:
    """Training images, how to read the test images, names of the classes, normalization."""
    root, own = Path(data.root), NORMALIZATIONS.get(data.name)
    if data.name == "digits":
        train, test = digits.read(data.split_seed, data.image_size)
        return train, lambda: test, _numbers(digits.CLASSES), None
    if not root.is_dir():
        raise ArgumentError(f"data.root='{root}': there is no such folder")
    if data.name in _CIFAR:
        layout = _CIFAR[data.name]
        batches = cifar.read(root, layout, train=True)
        return batches, lambda: cifar.read(root, layout, False), _numbers(layout.classes), own
    if data.name in _MNIST:
        inner = _MNIST[data.name]
        images = mnist.read(root, inner, train=True)
        return images, lambda: mnist.read(root, inner, False), _numbers(mnist.CLASSES), own
    files, names = folder.read_train(root)
    return files, lambda: folder.read_test(root, names), names, None


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]
