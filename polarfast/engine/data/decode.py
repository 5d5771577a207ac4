"""Decode a whole set once, on all cores, into one array."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from polarfast.errors import ArgumentError

from .images import ArrayImages, Images, UnreadableImage
from .transforms import Transform, as_stored

log = logging.getLogger(__name__)

CHUNK = 256  # images a task; with fewer, small images would cost more to hand out than to decode
REPORT_SECONDS = 5.0


def probe(images: Images, fit: Transform, skip_bad: bool) -> tuple[int, int, int]:
    """Channels, height and width of the first image that can be read, after ``fit``."""
    for index in range(len(images)):
        try:
            channels, height, width = fit(images.read(index)).shape
        except UnreadableImage:
            if not skip_bad:
                raise
            continue
        return channels, height, width
    raise ArgumentError(f"none of the {len(images)} images can be read")


def wrong_size(images: Images, index: int, found: Sequence[int], expected: Sequence[int]) -> str:
    """The message for an image of another size than the first."""
    return (
        f"{images.name(index)} is {found[2]}x{found[1]} pixels, the first one {expected[2]}x"
        f"{expected[1]} (width x height): set data.image_size to bring all to one size"
    )


def decode(
    images: Images, fit: Transform, shape: tuple[int, int, int], skip_bad: bool
) -> tuple[ArrayImages, list[str]]:
    """All images in one uint8 array ``[N, C, H, W]``, without the bad ones if they are skipped.

    Args:
        fit: applied to each image.
        shape: channels, height and width after ``fit``.

    Returns:
        The images, and for each image that is left out why.

    Raises:
        UnreadableImage: an image cannot be read, and ``skip_bad`` is False.
        ArgumentError: an image has another size than the first.
    """
    if isinstance(images, ArrayImages):
        if fit is as_stored:
            return images, []
        chunks = [fit(chunk) for chunk in images.pixels.split(CHUNK)]
        return ArrayImages(torch.cat(chunks), images.labels), []
    pixels = torch.empty(len(images), *shape, dtype=torch.uint8)
    good = torch.ones(len(images), dtype=torch.bool)

    def decode_chunk(start: int) -> list[str]:
        bad = []
        for index in range(start, min(start + CHUNK, len(images))):
            try:
                image = fit(images.read(index))
            except UnreadableImage as error:
                if not skip_bad:
                    raise
                good[index] = False
                bad.append(str(error))
                continue
            if image.shape != shape:
                raise ArgumentError(wrong_size(images, index, image.shape, shape))
            pixels[index] = image
        return bad

    # Threads, not processes: decoders release Python's lock, and the array needs no copying.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        bad = _with_progress(pool, decode_chunk, len(images))
    if bad:
        pixels = pixels[good]
    return ArrayImages(pixels, images.labels[good]), bad


def _with_progress(
    pool: ThreadPoolExecutor, decode_chunk: Callable[[int], list[str]], count: int
) -> list[str]:
    """Run all chunks in order; a line in the log every few seconds."""
    bad: list[str] = []
    begin = reported = time.monotonic()
    for number, chunk_bad in enumerate(pool.map(decode_chunk, range(0, count, CHUNK)), start=1):
        bad += chunk_bad
        now, done = time.monotonic(), min(number * CHUNK, count)
        if now - reported > REPORT_SECONDS or done == count:
            rate = done / max(now - begin, 1e-9)
            log.info("decoded %d of %d images, %.0f a second", done, count, rate)
            reported = now
    return bad
