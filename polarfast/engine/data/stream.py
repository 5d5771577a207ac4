"""Images decoded and varied by worker processes, each epoch anew, a few batches ahead."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import ArgumentError
from .batches import Normalization, Transform, fit, vary
from .dali import DaliQueue
from .decode import FileImages, Images, UnreadableImage, wrong_size
from .memory import rank_share
from .plan import EpochPlan, mix
from .reading import Parts
from .settings import Data
from .workers import Batch, BatchReader, Problem, Queue, seeded

_log = logging.getLogger(__name__)

ATTEMPTS = 20  # unreadable images in a row for which replacements are tried


class StreamSource:
    """A :class:`~polarfast.engine.data.source.DataSource` that reads its images each time.

    Workers give uint8 images in pinned memory; they are copied to the device while it computes and
    become floats there, a quarter of the bytes to copy. Augmentation is drawn from the plan's seed
    and the image's place in the epoch, whatever the number of workers.

    Args:
        shape: channels, height, width of the images as the model sees them.
        normalize: applied on the device.
    """

    def __init__(
        self,
        data: Data,
        parts: Parts,
        shape: tuple[int, int, int],
        normalize: Normalization,
        device: torch.device,
    ) -> None:
        self.name: str = data.name
        self.classes, self.image_shape = len(parts.class_names), shape
        self.train_size, self.test_size = len(parts.train), len(parts.test)
        self._parts, self._normalize, self._device = parts, normalize, device
        self._skip = data.skip_bad_images
        self._bad: set[tuple[str, int]] = set()
        pin = device.type == "cuda"
        reader = Reader(parts.train, vary(data, shape), shape, replace=self._skip)
        self._test_reader = Reader(parts.test, fit(data), shape, replace=False)
        self._train: BatchReader = Queue(reader, data.workers, pin)
        self._test: BatchReader = Queue(self._test_reader, data.workers, pin)
        if data.loader == "dali":
            # Data admits folders only, whose images are files.
            train, test = cast(FileImages, parts.train), cast(FileImages, parts.test)
            self._train = DaliQueue(train, data, vary=True, device=device)
            self._test = DaliQueue(test, data, vary=False, device=device)

    @property
    def bad_images(self) -> int:
        """How many unreadable images this process has met and skipped."""
        return len(self._bad)

    def train(self, plan: EpochPlan) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's micro-batches of the epoch, in order."""
        plan.check(self.train_size)
        return self._deliver("training", self._train.run(self._train_samples(plan)))

    def _train_samples(self, plan: EpochPlan) -> Iterator[list[tuple[int, int]]]:
        order = plan.order(self.train_size)
        for _, _, start, stop in plan.micro_batches(self.train_size):
            places = range(start, stop)
            yield [(int(order[place]), mix(plan.seed, place)) for place in places]

    def test(
        self, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the test images; unreadable ones are missing if skipped."""
        shares = rank_share(self.test_size, batch_size, rank, world)
        samples = [[(row, 0) for row in range(rows.start, rows.stop)] for rows in shares]
        return self._deliver("test", self._test.run(samples))

    def example(self, count: int = 1) -> Tensor:
        """The first ``count`` test images, read here and now."""
        items = [self._test_reader[row, 0] for row in range(min(count, self.test_size))]
        [(images, _)] = self._deliver("test", iter([self._test_reader.collate(items)]))
        return images

    def _deliver(self, part: str, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, problems in batches:
            for problem in problems:
                self._note(part, problem)
            if len(labels):
                images = images.to(self._device, non_blocking=True)
                labels = labels.to(self._device, non_blocking=True)
                yield self._normalize(images), labels

    def _note(self, part: str, problem: Problem) -> None:
        if not (self._skip and problem.skippable):
            raise ArgumentError(problem.message)
        if not self._bad:
            _log.warning("images are left out and counted; the first: %s", problem.message)
        self._bad.add((part, problem.image))


class Reader(Dataset[Any]):
    """Decodes and transforms the image at ``(index, seed)``, in a worker process or here.

    Args:
        transform: draws from torch's global generator, which is seeded for each image.
        shape: that every image must have afterwards.
        replace: put another image in the place of an unreadable one, chosen by the seed.
    """

    def __init__(
        self, images: Images, transform: Transform, shape: tuple[int, int, int], replace: bool
    ) -> None:
        self.images, self.transform, self.shape, self.replace = images, transform, shape, replace

    def __getitem__(self, sample: tuple[int, int]) -> tuple[Tensor | None, int, list[Problem]]:
        index, seed = sample
        problems: list[Problem] = []
        for attempt in range(ATTEMPTS if self.replace else 1):
            try:
                stored = self.images.read(index)
            except UnreadableImage as error:
                problems.append(Problem(index, str(error), skippable=True))
                index = mix(seed, attempt) % len(self.images)
                continue
            with seeded(seed):
                image = self.transform(stored)
            if image.shape != self.shape:
                message = wrong_size(self.images, index, image.shape, self.shape)
                return None, 0, [Problem(index, message, skippable=False)]
            return image, int(self.images.labels[index]), problems
        if self.replace:
            message = f"{ATTEMPTS} images in a row cannot be read; the last: {problems[-1].message}"
            problems.append(Problem(index, message, skippable=False))
        return None, 0, problems

    def collate(self, items: list[tuple[Tensor | None, int, list[Problem]]]) -> Batch:
        """Stack what could be read."""
        rows = [(image, label) for image, label, _ in items if image is not None]
        problems = [problem for _, _, several in items for problem in several]
        if not rows:
            return Batch(torch.empty(0, *self.shape), torch.empty(0, dtype=torch.long), problems)
        # Decoders write channels last: stacked that way, rows are copied as they lie.
        images = torch.stack([image.permute(1, 2, 0) for image, _ in rows]).permute(0, 3, 1, 2)
        return Batch(images, torch.tensor([label for _, label in rows]), problems)
