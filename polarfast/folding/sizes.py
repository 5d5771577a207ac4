"""Inputs of other sizes than the example's. A constant that is one there, too, is one.

Where halves are rounded down or up, windows are filled up, or a map is padded to another one, a
border shows at some sizes and not at others. So there are several, different in height and width:
odd however often they are halved, rounded down, or up, or first up and then down, and of every
remainder by 3, 5 and 7.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..inputs import Inputs, Spec, map_parts, parts_of, samples_in

#: What is added to a size that ends in binary ones: none and one further up survive halvings that
#: are rounded down and up, the others first up once or twice and then down.
OFFSETS = ((0, 2, -2), (-2, -6, 0))
#: Of an input of so many dimensions, those that may be places: (N, C, …), (N, …, C), (C, …), and of
#: videos each frame's places, or the frames. Waveforms are (N, T), features (N, C).
PLACES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((),),
    2: ((), (1,)),
    3: ((2,), (1, 2), (1,)),
    4: ((2, 3), (1, 2)),
    5: ((2, 3, 4), (3, 4), (1,)),
}
#: New size, given the size, over how many dimensions, and which of these it is.
Resize = Callable[[int, int, int], int]


def other_sizes(inputs: Inputs) -> Iterator[list[Inputs]]:
    """Inputs of other sizes, in groups, each for networks that run on none of those before."""
    choices = range(max(map(len, PLACES.values())))
    yield _different([_resized(inputs, _odd(o), k) for k in choices for o in OFFSETS], inputs)
    for resize in (_odd((0, 0, 0)), _multiple((3, 2)), _multiple((3, 3)), _near, _multiple((2, 2))):
        yield _different([_resized(inputs, resize, 0)], inputs)


def _different(found: list[Inputs], inputs: Inputs) -> list[Inputs]:
    unlike: list[Inputs] = []
    for each in found:
        if each.specs != inputs.specs and all(each.specs != other.specs for other in unlike):
            unlike.append(each)
    return unlike


def more_samples(inputs: Inputs) -> Inputs:
    """One more of whatever has as many as the first input."""

    def with_more(spec: Spec) -> Spec:
        first = samples_in(spec)

        def more(part: Spec) -> Spec:
            shape = part["shape"]
            same = bool(shape) and shape[0] == first
            return {**part, "shape": [shape[0] + 1, *shape[1:]]} if same else part

        return map_parts(spec, more)

    return replace(inputs, specs=tuple(map(with_more, inputs.specs)))


def _resized(inputs: Inputs, resize: Resize, choice: int) -> Inputs:
    """As many places along each dimension as `resize` says; at most two samples, where nothing has
    a meaning for each.
    """
    return replace(inputs, specs=tuple(_resized_spec(s, resize, choice) for s in inputs.specs))


def _resized_spec(spec: Spec, resize: Resize, choice: int) -> Spec:
    few = not any(part.get("given") for part in parts_of(spec))
    samples = samples_in(spec)
    from_end: dict[tuple[int, int], int] = {}  # (dimension from the end, size) -> new size
    sizes: dict[int, set[int]] = {}

    def images(part: Spec) -> Spec:
        shape = list(part["shape"])
        if not _is_image(part):
            return part
        axes = PLACES[len(shape)][min(choice, len(PLACES[len(shape)]) - 1)]
        for j, axis in enumerate(axes):
            size = shape[axis]
            if size > 1:
                shape[axis] = from_end[axis - len(shape), size] = resize(size, len(axes), j)
                sizes.setdefault(size, set()).add(shape[axis])
        if few and axes != (1, 2) and shape[0] == samples:  # else they may be the channels
            shape[0] = min(shape[0], 2)
        return {**part, "shape": shape}

    def the_others(part: Spec) -> Spec:
        """What has a meaning for each place, as a mask."""
        shape = list(part["shape"])
        if _is_image(part) or not part.get("given"):
            return part
        for axis, size in enumerate(shape[1:], 1):
            alike = sizes.get(size, set())
            new = from_end.get((axis - len(shape), size))
            shape[axis] = new or (next(iter(alike)) if len(alike) == 1 else size)
        return {**part, "shape": shape}

    return map_parts(map_parts(spec, images), the_others)


def _is_image(part: Spec) -> bool:
    """Whether a tensor may have places, or samples: numbers without meaning, or bytes."""
    return len(part["shape"]) in PLACES and (not part.get("given") or part["dtype"] == "uint8")


def _odd(offsets: Sequence[int]) -> Resize:
    """A larger size that ends in binary ones, and so stays odd when it is halved, plus an offset:
    five ones in images, three in volumes, which would take too much memory.
    """

    def resize(size: int, space: int, axis: int) -> int:
        ones = 31 if space < 3 else 7
        times = 4 if size <= 2 * ones else 2 if size <= 4 * ones else 1
        found = ((times if space < 3 else min(times, 2)) * size) | ones
        while found + min(offsets) <= size:
            found += ones + 1
        return found + offsets[axis % len(offsets)]

    return resize


def _multiple(times: Sequence[int]) -> Resize:
    def resize(size: int, space: int, axis: int) -> int:
        most = 3 if size < 64 and space < 3 else 2
        return size * min(times[axis % len(times)], most)

    return resize


def _near(size: int, space: int, axis: int) -> int:
    return size + (1, 3, 2)[axis % 3]
