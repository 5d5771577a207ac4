"""torchvision's v2 transforms of one image, uint8 ``[C, H, W]`` (or a batch of equal sizes)."""

from collections.abc import Callable

from torch import Tensor

from .settings import Data

Transform = Callable[[Tensor], Tensor]
# ImageNet's usual test: the shorter side to 256 for a crop of 224.
TEST_RESIZE = 256 / 224


def as_stored(image: Tensor) -> Tensor:
    """Nothing to do: images keep their stored size."""
    return image


def fit(data: Data) -> Transform:
    """What brings an image to the size that the model sees, without chance."""
    from torchvision.transforms import v2

    if data.side == 0:
        return as_stored
    cuts = data.augment == "resized-crop-flip"
    shorter = round(data.side * TEST_RESIZE) if cuts else data.side
    return v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(data.side)])


def vary(data: Data, shape: tuple[int, int, int]) -> Transform:
    """What a streamed training image goes through, by torch's global generator.

    Args:
        shape: channels, height and width that the model sees.
    """
    from torchvision.transforms import v2

    if data.augment == "resized-crop-flip":
        cut = v2.RandomResizedCrop(data.side, antialias=True)
        return v2.Compose([cut, v2.RandomHorizontalFlip()])
    if data.augment == "none":
        return fit(data)
    steps = [] if data.side == 0 else [fit(data)]
    steps.append(v2.RandomCrop(shape[1:], padding=data.pad))
    if data.augment == "crop-flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)
