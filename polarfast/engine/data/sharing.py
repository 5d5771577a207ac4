"""The test images, dealt out to processes."""

from polarfast.errors import ArgumentError


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
