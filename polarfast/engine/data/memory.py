"""Small data sets: decoded once and kept, each process its share of the work."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import ArgumentError
from .batches import Normalization, draw_moves, move
from .decode import ArrayImages
from .plan import EpochPlan, mix
from .settings import Data


def rank_share(images: int, batch_size: int, rank: int, world: int) -> list[slice]:
    """Batches of rows for one of ``world`` processes; over all of them, each image once.

    The shares are runs of neighbouring images and differ in size by one at most.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size}: must be positive")
    if not 0 <= rank < world:
        raise ArgumentError(f"rank={rank}: must lie within the {world} processes of world")
    first, last = images * rank // world, images * (rank + 1) // world
    return [slice(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]


class MemorySource:
    """A :class:`~polarfast.engine.data.source.DataSource` that holds its images.

    Args:
        train, test: decoded images of one size.
        normalize: applied after augmentation.
        bad_images: how many were left out as unreadable.
    """

    def __init__(
        self,
        data: Data,
        classes: int,
        train: ArrayImages,
        test: ArrayImages,
        normalize: Normalization,
        device: torch.device,
        bad_images: int = 0,
    ) -> None:
        self.name: str = data.name
        self.classes, self.bad_images = classes, bad_images
        self._data, self._normalize, self._device = data, normalize, device
        self._train = ArrayImages(train.pixels.to(device), train.labels.to(device))
        self._test = ArrayImages(test.pixels.to(device), test.labels.to(device))
        channels, height, width = train.pixels.shape[1:]
        self.image_shape = (channels, height, width)
        self.train_size, self.test_size = len(train), len(test)

    def train(self, plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's micro-batches of the epoch, in order."""
        plan.check(self.train_size)
        return self._micro_batches(plan)

    def _micro_batches(self, plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        order = plan.order(self.train_size).to(self._device)
        flip = self._data.augment == "crop-flip"
        for step, _, start, stop in plan.micro_batches(self.train_size):
            chosen = order[start:stop]
            images = self._train.pixels.index_select(0, chosen)
            if self._data.pad:
                # Drawn for the whole batch: a cut into other shards changes no image.
                seed = mix(plan.seed, step)
                moves = draw_moves(plan.batch_size, self._data.pad, flip, seed)
                first = start - step * plan.batch_size
                moves = moves[first : first + len(chosen)]
                images = move(images, self._data.pad, moves)
            yield self._normalize(images), self._train.labels[chosen]

    def test(
        self, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the test images."""
        for rows in rank_share(self.test_size, batch_size, rank, world):
            yield self._normalize(self._test.pixels[rows]), self._test.labels[rows]

    def example(self, count: int = 1) -> Tensor:
        """The first ``count`` test images."""
        return self._normalize(self._test.pixels[:count])
