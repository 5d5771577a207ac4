"""Folders of images, one folder a class: ``train/<class>/*`` and ``val/<class>/*`` or ``test/``."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ....errors import ArgumentError
from ..decode import FileImages

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
LAYOUT = (
    "an image folder holds train/<class>/<image> and val/<class>/<image> (or test/), with the same "
    "class folders in both"
)


def read_train(root: Path) -> tuple[FileImages, list[str]]:
    """The training images in the order of their names, and the names of the classes."""
    folder = root / "train"
    if not folder.is_dir():
        raise ArgumentError(f"'{folder}' is missing: {LAYOUT}; data.root is '{root}'")
    classes = _class_folders(folder)
    if not classes:
        raise ArgumentError(f"'{folder}' has no class folders: {LAYOUT}")
    images = _list_images(folder, classes)
    counts = torch.bincount(images.labels, minlength=len(classes))
    if int(counts.min()) == 0:
        empty = folder / classes[int(counts.argmin())]
        raise ArgumentError(
            f"class folder '{empty}' holds no training image (looked for {', '.join(SUFFIXES)})"
        )
    return images, classes


def read_test(root: Path, classes: list[str]) -> FileImages:
    """The images of val/, or of test/ where val/ has no class folders.

    ImageNet's own test/ is a heap without labels, so val/ comes first.
    """
    for name in ("val", "test"):
        folder = root / name
        found = _class_folders(folder) if folder.is_dir() else []
        if found:
            _check_same(folder, found, classes)
            images = _list_images(folder, classes)
            if len(images) == 0:
                raise ArgumentError(f"'{folder}' holds no image (of {', '.join(SUFFIXES)})")
            return images
    raise ArgumentError(
        f"neither '{root / 'val'}' nor '{root / 'test'}' has class folders: {LAYOUT}; or hold out "
        "a share of the training images with data.validation"
    )


def _check_same(folder: Path, found: list[str], classes: list[str]) -> None:
    missing = sorted(set(classes) - set(found))
    unknown = sorted(set(found) - set(classes))
    if missing or unknown:
        differences = [f"without {', '.join(missing[:5])}"] if missing else []
        differences += [f"with {', '.join(unknown[:5])}, not in train/"] if unknown else []
        raise ArgumentError(
            f"'{folder}' has {len(found)} class folders, train/ {len(classes)}: "
            f"{' and '.join(differences)}; both must have the same"
        )


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_images(folder: Path, classes: list[str]) -> FileImages:
    import numpy

    names: list[bytes] = []
    labels: list[int] = []
    owners = {_place(outer): str(outer) for outer in (folder, *folder.resolve().parents)}
    for name in classes:
        _own(owners, folder / name, name)
    for label, name in enumerate(classes):
        found = sorted(_files_below(folder, name, owners))
        names += found
        labels += [label] * len(found)
    return FileImages(folder, numpy.array(names, dtype=numpy.bytes_), torch.tensor(labels).long())


def _files_below(folder: Path, name: str, owners: dict[tuple[int, int], str]) -> Iterator[bytes]:
    """Each folder once, however many links lead to it."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder / name, followlinks=True):
        place = _own(owners, Path(parent), name)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        # In order, so that it is always the same of several links that is followed.
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        below = os.path.relpath(parent, folder)
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.fsencode(os.path.join(below, file))


def _own(owners: dict[tuple[int, int], str], folder: Path, name: str) -> tuple[int, int]:
    """Note that a folder is of that class; what tells it from all others, whatever it is called.

    Raises:
        ArgumentError: it is of another class, or holds them all.
    """
    place = _place(folder)
    owner = owners.setdefault(place, name)
    if owner != name:
        raise ArgumentError(
            f"'{folder}' is a link to '{owner}', whose images would be of two classes: remove it"
        )
    return place


def _place(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
