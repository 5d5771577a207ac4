"""All operators of a network, timed at many widths."""

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..tracing.operations import Operation
from .prices import Times, ends
from .timing import Bench, Call, times_in_turns

#: Shares of the channels at which operators without a weight matrix are timed.
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
#: How often each call is timed in one pass over all of them; and the passes that are made at least.
ROUNDS, PASSES = 3, 2
#: Calls that take turns. Libraries remember how to run about a thousand sizes.
AT_ONCE = 200


@dataclass(eq=False)
class _Point:
    """One operator at one width.

    Attributes:
        kind, key, place: where its time belongs in `Times`: name of the field, key in that, width.
        make: what to time.
        ms: its times.
    """

    kind: str
    key: str
    place: Any
    make: Callable[[], Call]
    ms: list[float] = field(default_factory=list)


def measure(
    operations: Sequence[Operation],
    bench: Bench,
    step: int,
    *,
    error: float,
    seconds: float,
    progress: Callable[[float], None],
) -> Times:
    """Time every operator at all its widths, until the sum over the network is known well enough.

    Args:
        operations: what the network runs.
        bench: where.
        step: as for `Times`.
        error: standard error of the sum, as a share of it, at which to stop.
        seconds: after which to stop in any case, once every width was timed in two passes.
        progress: called with the share of the time that has passed.
    """
    points, whole = _points(operations, bench, step)
    calls = Counter(operation.key for operation in operations)
    # Operators of one kind in a row would find their instructions in the caches, but the first.
    order = random.Random(0).sample(points, len(points))
    start, done = time.perf_counter(), 0
    while True:
        for first in range(0, len(order), AT_ONCE):
            some = order[first : first + AT_ONCE]
            found = times_in_turns(bench, [point.make() for point in some], ROUNDS)
            for point, ms in zip(some, found, strict=True):
                point.ms += ms
            part = (done + (first + len(some)) / len(points)) / PASSES
            progress(min(max(part, (time.perf_counter() - start) / seconds), 1.0))
        done += 1
        if done < PASSES:
            continue
        spent = time.perf_counter() - start
        if _error(whole, calls) <= error or spent * (done + 1) / done > seconds:
            break
    times = Times(step)
    for point in points:
        median = statistics.median(point.ms)
        if point.kind == "projections":
            times.projections.setdefault(point.key, {})[point.place] = median
        else:
            getattr(times, point.kind).setdefault(point.key, []).append((point.place, median))
    return times


def _error(whole: dict[str, _Point], calls: Counter[str]) -> float:
    """The standard error of the sum over the whole network, as a share of it."""
    total, squares = 0.0, 0.0
    for key, number in calls.items():
        ms = whole[key].ms
        quarters = statistics.quantiles(ms, n=4)
        # Of a median: 1.25 standard deviations of one time, by the middle half of them.
        one = 1.25 * (quarters[2] - quarters[0]) / 1.35 / math.sqrt(len(ms))
        total += number * statistics.median(ms)
        squares += (number * one) ** 2
    return math.sqrt(squares) / total if total else 0.0


def _points(
    operations: Sequence[Operation], bench: Bench, step: int
) -> tuple[list[_Point], dict[str, _Point]]:
    """What to time; and of each operator, by key, its time in the network as it is."""
    found: dict[Hashable, _Point] = {}
    whole: dict[str, _Point] = {}
    for operation in operations:
        for point in _points_of(operation, bench, step):
            known = found.setdefault((point.kind, point.key, point.place), point)
            if point.kind != "put_backs":
                whole[operation.key] = known  # the last one is at full width
    return list(found.values()), whole


def _points_of(operation: Operation, bench: Bench, step: int) -> Iterator[_Point]:
    """Of one operator, that at its full width last."""
    key = operation.key
    if operation.projection is not None:
        rows, columns = ends(operation, step)
        squares = [(width, width) for width in rows]
        for pair in squares if operation.projection.depthwise else product(rows, columns):
            yield _Point("projections", key, pair, _at_widths(operation, bench, *pair))
        return
    scales = bool(operation.activations()) and _works_narrow(operation, bench)
    for share in SHARES if scales else SHARES[-1:]:
        real = operation.share_at(share)  # of few channels there is no exact eighth
        if operation.norm is not None and operation.args[0].ids is not None:
            yield _Point("put_backs", key, real, _put_back(operation, bench, share))
        yield _Point("others", key, real, _at_share(operation, bench, share))


def _at_widths(operation: Operation, bench: Bench, n_in: int, n_out: int) -> Callable[[], Call]:
    return lambda: bench.call(operation, operation.at_widths(n_in, n_out), operation.kwargs)


def _at_share(operation: Operation, bench: Bench, share: float) -> Callable[[], Call]:
    return lambda: bench.call(operation, *operation.at_share(share))


def _put_back(operation: Operation, bench: Bench, share: float) -> Callable[[], Call]:
    (x, *_), _ = operation.at_share(share)
    return lambda: bench.put_back(operation, x.shape[1])


def _works_narrow(operation: Operation, bench: Bench) -> bool:
    """Whether it runs with fewer channels: not where numbers in its call count them."""
    try:
        for share in SHARES:
            bench.call(operation, *operation.at_share(share)).run()
    except (RuntimeError, IndexError, ValueError):
        return False
    return True
