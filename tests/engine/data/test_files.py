"""Reading data sets from disk: the formats, against the files' bytes and torchvision."""

import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import epoch, opened
from support.image_sets import noise, write_cifar10, write_cifar100, write_folder, write_mnist

from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.reading import read_parts
from polarfast.engine.data.settings import Data
from polarfast.errors import ArgumentError

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_pixels_and_labels(tmp_path: Path, protocol: int) -> None:
    pixels = write_cifar10(tmp_path, protocol=protocol)
    source = opened("cifar10", tmp_path)
    assert (source.train_size, source.test_size, source.classes) == (100, 20, 10)
    assert source.image_shape == (3, 32, 32)
    images, labels = epoch(source, 100)
    order = EpochPlan(seed=0, batch_size=100).order(100)
    # Each row holds 1,024 bytes of red, then green, then blue, row by row.
    expected = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))[order].double() / 255
    mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor([0.2470, 0.2435, 0.2616], dtype=torch.float64).view(-1, 1, 1)
    torch.testing.assert_close(images.double(), (expected - mean) / std, rtol=0, atol=1e-5)
    assert labels.tolist() == [int(n) % 20 % 10 for n in order]


def test_cifar10_agrees_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path)
    # torchvision takes its own files only, and wants the names of the classes too.
    meta = {"label_names": [str(n) for n in range(10)]}
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = CIFAR10(str(tmp_path), train=False, download=False)
    ours = read_parts(Data("cifar10", str(tmp_path))).test
    assert ours.labels.tolist() == theirs.targets
    for index in range(len(theirs)):
        assert np.array_equal(
            ours.read(index).permute(1, 2, 0).numpy(), np.asarray(theirs[index][0])
        )


def test_cifar10_from_the_archive(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "unpacked")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "unpacked" / "cifar-10-batches-py", "cifar-10-batches-py")
    packed, unpacked = opened("cifar10", tmp_path), opened("cifar10", tmp_path / "unpacked")
    assert torch.equal(epoch(packed, 100)[0], epoch(unpacked, 100)[0])
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(ArgumentError, match="cifar-10-python.tar.gz' cannot be unpacked"):
        opened("cifar10", tmp_path)


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    source = opened("cifar100", tmp_path)
    assert (source.train_size, source.test_size, source.classes) == (200, 100, 100)
    assert next(source.test(100))[1].tolist() == list(range(100))


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path: Path, name: str, folder: str, packed: bool) -> None:
    import torchvision

    write_mnist(tmp_path, folder, packed=packed)
    source = opened(name, tmp_path)
    assert (source.train_size, source.test_size, source.classes) == (40, 20, 10)
    assert source.image_shape == (1, 28, 28)
    if packed:
        return
    theirs = getattr(torchvision.datasets, folder)(str(tmp_path), train=True, download=False)
    ours = read_parts(Data(name, str(tmp_path))).train  # type: ignore[arg-type]
    assert torch.equal(ours.labels, theirs.targets)
    assert torch.equal(torch.stack([ours.read(n)[0] for n in range(40)]), theirs.data)


def test_mnist_enlarged(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for keep in ("device", "stream"):
        source = opened("mnist", tmp_path, image_size=32, keep=keep, workers=0)
        assert source.image_shape == (1, 32, 32)
        assert next(source.test(4))[0].shape == (4, 1, 32, 32)


@pytest.mark.parametrize("suffix", [".png", ".JPEG", ".bmp", ".webp"])
@pytest.mark.parametrize("test_name", ["val", "test"])
def test_folder_agrees_with_torchvision(tmp_path: Path, suffix: str, test_name: str) -> None:
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path, suffix=suffix, test_name=test_name)
    parts = read_parts(Data("folder", str(tmp_path)))
    for ours, name in ((parts.train, "train"), (parts.test, test_name)):
        theirs = ImageFolder(str(tmp_path / name))
        assert parts.class_names == theirs.classes
        assert ours.labels.tolist() == theirs.targets
        for index in range(len(theirs)):
            pixels = ours.read(index).permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, np.asarray(theirs[index][0]))


def test_imagenets_heap_of_test_images_is_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path, test=2)
    (tmp_path / "test").mkdir()
    Image.fromarray(noise(0, 5, 5, 3)).save(tmp_path / "test" / "00001.png")
    assert opened("folder", tmp_path).test_size == 6


def test_names_that_are_not_ascii_and_folders_within_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, test=1, classes=("bär", "hund"))
    inner = tmp_path / "train" / "bär" / "süß"
    inner.mkdir()
    Image.fromarray(noise(0, 10, 12, 3)).save(inner / "größe.png")
    (tmp_path / "train" / "hund" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "hund" / "notes.txt").write_text("not an image")
    source = opened("folder", tmp_path)
    assert source.train_size == 3
    assert sorted(epoch(source, 3)[1].tolist()) == [0, 0, 1]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_all_kinds_of_pixels_become_rgb(tmp_path: Path, mode: str) -> None:
    write_folder(tmp_path, train=1, test=1)
    file = tmp_path / "train" / "ant" / ("000.jpg" if mode == "CMYK" else "000.png")
    (tmp_path / "train" / "ant" / "000.png").unlink()
    Image.fromarray(noise(0, 10, 12, 3)).convert(mode).save(file)
    image = read_parts(Data("folder", str(tmp_path))).train.read(0)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_large_images_are_normalized_as_imagenet(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, test=1, size=(64, 80))
    for keep in ("device", "stream"):
        source = opened("folder", tmp_path, keep=keep, workers=0)
        image = read_parts(Data("folder", str(tmp_path))).test.read(0)
        expected = (image / 255 - IMAGENET_MEAN) / IMAGENET_STD
        torch.testing.assert_close(source.example()[0], expected, rtol=0, atol=1e-5)


def test_small_images_are_normalized_by_the_training_images(tmp_path: Path) -> None:
    write_folder(tmp_path, train=4, test=2)
    images = epoch(opened("folder", tmp_path), 12)[0].double()
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    spread = images.std((0, 2, 3), correction=0)
    torch.testing.assert_close(spread, torch.ones(3).double(), rtol=0, atol=1e-6)


def test_test_images_are_resized_and_cropped_in_the_middle(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, test=1, size=(100, 80), suffix=".png")
    source = opened("folder", tmp_path, augment="resized-crop-flip", image_size=56, workers=0)
    with Image.open(tmp_path / "val" / "ant" / "000.png") as image:
        small = image.resize((80, 64), Image.Resampling.BILINEAR)  # 64 = 56 * 256 / 224
        pixels = np.asarray(small)[4:60, 12:68].copy()
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    # Pillow and torch round differently here and there, by two of 255 levels at most.
    torch.testing.assert_close(source.example()[0], expected, rtol=0, atol=2.01 / 255 / 0.224)


def test_sizes_that_differ_become_one(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, test=1)
    Image.fromarray(noise(0, 30, 20, 3)).save(tmp_path / "train" / "bee" / "wide.png")
    for keep in ("device", "stream"):
        with pytest.raises(ArgumentError, match="wide.png' is 20x30.*12x10.*data.image_size"):
            epoch(opened("folder", tmp_path, keep=keep, workers=0), 7)
        images, _ = epoch(opened("folder", tmp_path, keep=keep, workers=0, image_size=8), 7)
        assert images.shape == (7, 3, 8, 8)


def test_a_subset_decodes_only_what_it_needs(tmp_path: Path) -> None:
    write_folder(tmp_path, train=10, test=4)
    parts = read_parts(Data("folder", str(tmp_path), train_images=6, test_images=3))
    chosen = {str(parts.train.name(n)) for n in range(6)}  # type: ignore[attr-defined]
    for file in (tmp_path / "train").rglob("*.png"):
        if f"image '{file}'" not in chosen:
            file.write_bytes(b"no image")
    source = opened("folder", tmp_path, train_images=6, test_images=3)
    assert epoch(source, 6)[1].bincount().tolist() == [2, 2, 2]
    assert source.test_size == 3


@pytest.mark.slow
def test_importing_the_package_imports_no_image_library() -> None:
    code = (
        "import sys, polarfast.engine.data;"
        "print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path)
    plain = read_parts(Data(name="folder", root=str(tmp_path)))
    classes = sorted(folder for folder in (tmp_path / "train").iterdir())
    (classes[0] / "again").symlink_to(".")  # each would be every image once more, up to 40 deep
    (classes[0] / "up").symlink_to("again/again")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(noise(7, 24, 24, 3)).save(elsewhere / "more.png")
    for name in ("x", "y"):
        (classes[1] / name).symlink_to(elsewhere, target_is_directory=True)
    linked = read_parts(Data(name="folder", root=str(tmp_path)))
    before, after = (torch.bincount(parts.train.labels).tolist() for parts in (plain, linked))
    assert after == [before[0], before[1] + 1, *before[2:]]


@pytest.mark.parametrize("link", ["zz", "bee/zz"])
@pytest.mark.parametrize("target", [".", "..", "ant"])
def test_a_link_to_other_classes(tmp_path: Path, link: str, target: str) -> None:
    write_folder(tmp_path)
    train = tmp_path / "train"
    (train / link).symlink_to((train / target).resolve(), target_is_directory=True)
    with pytest.raises(ArgumentError, match="zz' is a link to .*two classes"):
        read_parts(Data(name="folder", root=str(tmp_path)))
