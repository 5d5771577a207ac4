"""Batches read by worker processes, a few ahead of the training that takes them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import PolarfastError, RunError


class Problem(NamedTuple):
    """Why an image is not in its batch; data, since exceptions lose their text on the way."""

    image: int
    message: str
    skippable: bool


class Batch(NamedTuple):
    """uint8 images ``[b, C, H, W]`` (channels last in memory), int64 labels ``[b]``, problems."""

    images: Tensor
    labels: Tensor
    problems: list[Problem]


class BatchReader(Protocol):
    """Reads batches of ``(index, seed)``, in order."""

    def run(self, batches: Iterable[list[tuple[int, int]]]) -> Iterator[Batch]: ...


class Queue:
    """A DataLoader whose workers live on from epoch to epoch, fed with batches of samples.

    Args:
        reader: data set whose ``collate`` makes a batch of its items.
        pin: give batches in pinned memory.
    """

    def __init__(self, reader: Any, workers: int, pin: bool) -> None:
        self._reader, self._workers, self._pin = reader, workers, pin
        self._batches = _Fed()  # not self: a cycle would keep the workers of a source let go
        self._loader: DataLoader[Any] | None = None
        self._run = 0

    def run(self, batches: Iterable[list[tuple[int, int]]]) -> Iterator[Any]:
        """Read these batches, in order; a run that is not finished yet ends here."""
        self._run += 1
        mine = self._run
        self._batches.current = batches
        if self._loader is None:
            self._loader = DataLoader(
                self._reader,
                batch_sampler=self._batches,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                pin_memory=self._pin,
                collate_fn=self._reader.collate,
                # Without one of its own, the loader would draw from torch's global generator.
                generator=torch.Generator(),
            )
        for batch in self._watched(self._loader):
            yield batch
            if self._run != mine:
                raise PolarfastError(
                    "this epoch of streamed images was given up when another one began; "
                    "finish one before the next, or load the data twice"
                )

    @staticmethod
    def _watched(batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; a worker that was killed is an error of ours."""
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(
                f"a process that reads images died ({str(error).splitlines()[0]}): often memory or "
                "shared memory ran out; try fewer --data.workers, then start the same command "
                "again, which goes on from the last checkpoint"
            ) from error


class _Fed:
    """What the workers are to read next: batches of ``(index, seed)``."""

    def __init__(self) -> None:
        self.current: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.current)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator at ``seed``, and afterwards as it was.

    Not ``torch.manual_seed``: that would also reset the generators of the GPUs.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
