"""Image folders decoded, cropped, resized and mirrored by NVIDIA DALI, on the GPU.

Worker processes read the encoded files and draw each image's crop from its seed, with the same
draws as the torch loader; DALI carries them out. So epochs stay reproducible and can be taken up
at any step. Pixels differ by a few levels of 255 from the torch loader's, since DALI decodes and
resizes with code of its own. On a CPU device the same pipeline runs on the CPU.
"""

import importlib.util
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import ArgumentError
from .batches import TEST_RESIZE
from .decode import FileImages
from .settings import Data
from .workers import Batch, Problem, Queue, seeded


def require() -> None:
    """Refuse where DALI is not installed."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia at all
        found = False
    if not found:
        raise ArgumentError(
            "data.loader=dali: NVIDIA DALI is not installed; pip install nvidia-dali-cuda120 "
            "(or -cuda130 for CUDA 13), or use loader: torch"
        )


class Cut(NamedTuple):
    """One encoded file and the part of its image to use, in pixels of the stored image."""

    encoded: Tensor
    top: int
    left: int
    height: int
    width: int
    flip: bool
    label: int


class EncodedBatch(NamedTuple):
    """The files one after the other, uint8, and a row of numbers for each: its length, then as Cut.

    One tensor for all files: each tensor that a worker hands over costs a file descriptor.
    """

    encoded: Tensor
    rows: Tensor
    indices: list[int]
    problems: list[Problem]


class EncodedReader(Dataset[Any]):
    """Reads the file at ``(index, seed)`` and draws its crop, without decoding it."""

    def __init__(self, images: FileImages, data: Data, vary: bool) -> None:
        self.images, self.data = images, data
        self.vary = vary and data.augment == "resized-crop-flip"

    def __getitem__(self, sample: tuple[int, int]) -> tuple[int, Cut | Problem]:
        import numpy
        from PIL import Image

        index, seed = sample
        path = self.images.path(index)
        try:
            encoded = torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint8))
            with Image.open(path) as image:  # reads the header only
                width, height = image.size
        except (OSError, SyntaxError, ValueError) as error:
            message = f"image '{path}' cannot be read ({error}); replace or remove the file"
            return index, Problem(index, message, skippable=False)
        box = self._random_box(height, width, seed) if self.vary else self._middle(height, width)
        return index, Cut(encoded, *box, int(self.images.labels[index]))

    def _random_box(self, height: int, width: int, seed: int) -> tuple[int, int, int, int, bool]:
        from torchvision.transforms import v2

        with seeded(seed):
            crop = v2.RandomResizedCrop(self.data.side)
            box = crop.make_params([torch.empty(3, height, width, device="meta")])
            flip = bool(torch.rand(1) < 0.5)
        return box["top"], box["left"], box["height"], box["width"], flip

    def _middle(self, height: int, width: int) -> tuple[int, int, int, int, bool]:
        cuts = self.data.augment == "resized-crop-flip"
        side = round(min(height, width) / (TEST_RESIZE if cuts else 1))
        return (height - side) // 2, (width - side) // 2, side, side, False

    def collate(self, items: list[tuple[int, Cut | Problem]]) -> EncodedBatch:
        """One batch; empty if one of its files cannot be read."""
        indices = [index for index, _ in items]
        cuts = [item for _, item in items if isinstance(item, Cut)]
        problems = [item for _, item in items if isinstance(item, Problem)]
        if problems:
            return EncodedBatch(torch.empty(0), torch.empty(0), indices, problems)
        rows = torch.tensor([[len(cut.encoded), *cut[1:]] for cut in cuts])
        return EncodedBatch(torch.cat([cut.encoded for cut in cuts]), rows, indices, problems)


class DaliQueue:
    """Like :class:`~polarfast.engine.data.workers.Queue`, with DALI behind the workers."""

    def __init__(self, images: FileImages, data: Data, vary: bool, device: torch.device) -> None:
        require()
        self._images, self._side, self._device = images, data.side, device
        self._threads = max(1, data.workers)
        reader = EncodedReader(images, data, vary)
        self._queue = Queue(reader, data.workers, pin=False)
        self._encoded: Iterator[EncodedBatch] = iter(())
        self._waiting: deque[EncodedBatch] = deque()
        self._pipeline: Any = None
        self._size = 0

    def run(self, batches: Iterable[list[tuple[int, int]]]) -> Iterator[Batch]:
        """Read and decode these batches, in order, none larger than the first."""
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            return
        self._encoded = self._queue.run(chain([first], iterator))
        self._waiting.clear()
        # A pipeline left in the middle of a run still holds images of that run.
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is None or len(first) > self._size:
            pipeline, self._size = self._build(len(first)), len(first)
        else:
            pipeline.reset()
        while True:
            try:
                (images,) = pipeline.run()
            except StopIteration:
                break
            except RuntimeError as error:
                self._blame(error)
            rows = self._waiting.popleft().rows
            yield Batch(self._to_torch(images.as_tensor()), rows[:, -1].contiguous(), [])
        self._pipeline = pipeline

    def _feed(self) -> tuple[list[Any], ...]:
        """The next batch for the pipeline, which asks some batches ahead."""
        batch = next(self._encoded)
        for problem in batch.problems:
            raise ArgumentError(problem.message)
        self._waiting.append(batch)
        rows = batch.rows.int()
        files = [part.numpy() for part in batch.encoded.split(rows[:, 0].tolist())]
        parts = (rows[:, 1:3], rows[:, 3:5], rows[:, 5])
        return files, *([row.numpy() for row in part] for part in parts)

    def _build(self, size: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self._device.type == "cuda"

        def graph() -> Any:
            encoded, start, shape, flip = fn.external_source(
                source=self._feed,
                num_outputs=4,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            )
            images = fn.decoders.image_slice(
                encoded,
                device="mixed" if gpu else "cpu",
                start=start,
                shape=shape,
                axes=[0, 1],
                output_type=types.RGB,
            )
            images = fn.resize(
                images,
                resize_x=self._side,
                resize_y=self._side,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            return fn.flip(images, horizontal=flip)

        device = (self._device.index or 0) if gpu else None
        pipeline = pipeline_def(graph)(
            batch_size=size, num_threads=self._threads, device_id=device, prefetch_queue_depth=2
        )
        pipeline.build()
        return pipeline

    def _to_torch(self, images: Any) -> Tensor:
        """A copy in torch's memory, ``[b, 3, H, W]``, channels last as DALI writes them."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        copy = torch.empty(images.shape(), dtype=torch.uint8, device=self._device)
        gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if gpu else None
        feed_ndarray(images, copy, cuda_stream=stream)
        return copy.permute(0, 3, 1, 2)

    def _blame(self, error: RuntimeError) -> None:
        """DALI does not say which file it stumbled over: decode those at hand one by one."""
        for batch in self._waiting:
            for index in batch.indices:
                self._images.read(index)
        raise ArgumentError(
            f"DALI cannot decode a batch whose images Pillow reads ({error}); use loader: torch"
        ) from error
