"""Rules for operators that take the channels apart: reshapes, chunks, slices, shuffles."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .graph import PIN, along, varying_dims
from .recorder import Recorder, Value, spread
from .rules import movement
from .sizes import FIXED, Kept, Size, becomes, channels_of

SPLIT = "a reshape splits the channels by sizes that do not follow their number"

# --- reshapes


def view(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Reshape. Dimensions may be merged; one along which channels vary may be split in two or more
    if all but one of the sizes stay as they are whatever the number of channels. Channels at the
    same place along that one are then the same.
    """
    value = rec.values[args[0]]
    asked = rec.asked if rec.asked is not None and len(rec.asked) == out.dim() else None
    varying = varying_dims(value.ids)
    # What holds no element has no channels to tell apart (a detector that finds nothing).
    blocks = _blocks(value.ids.shape, out.shape) if out.numel() else ()
    for sources, pieces in blocks:
        dims = [dim for dim in sources if value.ids.shape[dim] > 1]
        pieces = [dim for dim in pieces if out.shape[dim] > 1]
        if not varying & set(dims):
            for size in _at(asked, pieces) if asked else ():  # of other activations
                if (row := channels_of(size)) is not None:
                    rec.pin(row, FIXED)
            continue
        if len(pieces) > 1:
            _split(rec, value, dims, [out.shape[d] for d in pieces], asked and _at(asked, pieces))
        elif asked is not None:
            becomes(rec, value, dims, asked[pieces[0]])
    movement(rec, func, (args[0], list(out.shape)), out)


def _at(items: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [items[place] for place in places]


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, list[int]]]:
    """Dimensions before and after that hold the same elements."""
    i = j = 0
    while i < len(before) and j < len(after):
        first_i, first_j, left, right = i, j, before[i], after[j]
        while left != right:
            if left < right:
                i += 1
                left *= before[i]
            else:
                j += 1
                right *= after[j]
        i, j = i + 1, j + 1
        yield range(first_i, i), list(range(first_j, j))


def _split(
    rec: Recorder, value: Value, dims: list[int], sizes: list[int], asked: list[Any] | None
) -> None:
    """One dimension becomes several."""
    row = along(value.ids, dims[0]) if len(dims) == 1 else None
    if row is None or asked is None:
        rec.pin(value.ids, SPLIT)
        return
    following = [(i, ids) for i, size in enumerate(asked) if (ids := channels_of(size)) is not None]
    places = [i for i, _ in following]
    if not following:
        places = [i for i, size in enumerate(asked) if type(size) is int and size == -1]
    if len(places) != 1:
        rec.pin(value.ids, SPLIT)
        return
    for _, ids in following:
        if ids.numel() == row.numel():
            rec.match(row, ids, SPLIT)
        else:
            rec.pin(torch.cat((row, ids)), SPLIT)
    together = row.view(sizes).movedim(places[0], 0).flatten(1)
    rec.graph.pooled.append(row)  # no size can be inferred from no elements
    rec.tie(together[:, :1].expand_as(together), together)


def channel_shuffle(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """(N, C, ...) and the number of groups: as the reshapes it stands for."""
    value = rec.values[args[0]]
    row = along(value.ids, 1)
    if row is None:
        rec.pin(value.ids, SPLIT)
        rec.put_pinned(out, [value])
        return
    groups = row.view(args[1], -1)
    rec.tie(groups[:1].expand_as(groups), groups)
    rec.put(out, spread(groups.t().reshape(-1), out.shape, 1), [value])


def pixel_shuffle(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """(*, C·r², H, W) to (*, C, H·r, W·r) or back: the r² channels of one place go together."""
    value = rec.values[args[0]]
    dim = out.dim() - 3
    row = along(value.ids, dim)
    if row is None:
        rec.pin(value.ids, SPLIT)
        rec.put_pinned(out, [value])
        return
    if row.numel() > out.shape[dim]:
        groups = row.view(out.shape[dim], -1)
        rec.tie(groups[:, :1].expand_as(groups), groups)
        row = groups[:, 0]
    else:
        row = row.repeat_interleave(out.shape[dim] // row.numel())
    rec.put(out, spread(row, out.shape, dim), [value])


def patches(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """(N, C, H, W) to (N, C·k², places) or back (unfold, fold): the k² rows of one channel go
    together.
    """
    value, taps = rec.values[args[0]], math.prod(args[1 if len(args) == 5 else 2])
    dim = value.ids.dim() - (3 if len(args) == 5 else 2)
    row = along(value.ids, dim)
    if row is None:
        rec.pin(value.ids, SPLIT)
        rec.put_pinned(out, [value])
        return
    if len(args) == 5:  # im2col(x, kernel, dilation, padding, stride)
        rec.put(out, spread(row.repeat_interleave(taps), out.shape, out.dim() - 2), [value])
        return
    groups = row.view(-1, taps)  # col2im(x, size, kernel, ...)
    rec.tie(groups[:, :1].expand_as(groups), groups)
    rec.put(out, spread(groups[:, 0], out.shape, out.dim() - 3), [value])


# --- chunks and slices


Places = dict[int, list[int] | None]


def cut(places_of: Callable[..., Places]) -> Callable[..., None]:
    """A movement that cuts some dimensions.

    Args:
        places_of: from the operator's arguments, dimension -> where it is cut; None: it is taken
            apart in another way.
    """

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], out: Any) -> None:
        value, name = rec.values[args[0]], func.overloadpacket.__name__
        rank = max(value.ids.dim(), 1)
        cuts = {dim % rank: places for dim, places in places_of(*args).items()}
        for dim in cuts.keys() & varying_dims(value.ids):
            if not _follows(rec, value, dim, cuts[dim], name):
                rec.pin(value.ids, f"cut at constant positions along the channels ({name})")
        movement(rec, func, args, out)

    return rule


def _follows(rec: Recorder, value: Value, dim: int, places: list[int] | None, name: str) -> bool:
    """Whether a dimension is cut at shares of the number of channels that stay such shares; then as
    many channels must stay between any two.
    """
    row = along(value.ids, dim)
    if row is None or places is None or not rec.asked:
        return False
    places = [place for place in places if 0 < place < row.numel()]
    step = math.gcd(row.numel(), *places)
    if rec.asked[0] is Kept:
        if rec.asked[1] * step != row.numel() or len(places) + 1 != rec.asked[1]:
            return False  # pieces of unequal size, or fewer than asked for
    else:
        if name == "split":
            found = [channels_of(rec.asked[0])]
        elif name == "split_with_sizes":
            found = [channels_of(size) for size in rec.asked[: len(places) + 1]]
        else:
            found = [_deciding(rec.asked, place, row.numel()) for place in places]
        known = [ids for ids in found if ids is not None and ids.numel() == row.numel()]
        if len(known) < len(found):
            return False
        rec.graph.pooled.append(row)  # split(0) is an error
        for ids in known:
            rec.match(row, ids, f"cut by the number of other channels ({name})")
    rec.balance(row.view(-1, step))
    return True


def _deciding(asked: list[Any], place: int, length: int) -> Tensor | None:
    """The channels whose number decides where a slice begins or ends; None: it is fixed."""
    sizes = [size for size in asked if isinstance(size, Size)]
    sizes += [one + other for one, other in combinations(sizes, 2)]
    for size in sizes:
        if int(size) in (place, place - length) and (ids := channels_of(size)) is not None:
            return ids
    return None


def _slice(
    x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Places:
    length = x.shape[dim]
    first, last = start or 0, length if end is None else min(end, length)
    places = [place + length if place < 0 else place for place in (first, last)]
    if places == [0, length] and step == 1:
        return {}
    return {dim: places if step == 1 else None}


def _sizes(x: Tensor, sizes: Sequence[int] | int, dim: int = 0) -> Places:
    if isinstance(sizes, int):
        return {dim: list(range(0, x.shape[dim], sizes))}
    return {dim: [sum(sizes[:i]) for i in range(len(sizes))]}


def pad(rec: Recorder, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """Padding: along the channels it adds positions that stay, elsewhere channels just grow."""
    value, amounts = rec.values[args[0]], list(args[1])
    varying = varying_dims(value.ids)
    rank = value.ids.dim()
    for i, amount in enumerate(amounts):
        if rank - 1 - i // 2 not in varying:
            amounts[i] = 0
        elif amount < 0:
            rec.pin(value.ids, "cropped along the channels (constant_pad_nd)")
    ids = value.ids
    for dim in set(range(rank)) - varying:
        ids = ids.narrow(dim, 0, 1)
    rec.put(out, func(ids, amounts, PIN).expand(out.shape), [value])


CUTS: dict[str, Callable[..., None]] = {
    "slice": cut(_slice),
    "split": cut(_sizes),
    "split_with_sizes": cut(_sizes),
    "constant_pad_nd": pad,
    "native_channel_shuffle": channel_shuffle,
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_shuffle,
    "im2col": patches,
    "col2im": patches,
    "select": cut(lambda x, dim, index: {dim: None}),
    "unbind": cut(lambda x, dim=0: {dim: None}),
    "index_select": cut(lambda x, dim, index: {dim: None}),
    "flip": cut(lambda x, dims: dict.fromkeys(dims)),
    "rot90": cut(lambda x, k=1, dims=(0, 1): dict.fromkeys(dims)),
    "roll": cut(lambda x, shifts, dims=(): dict.fromkeys(dims or range(x.dim()))),
    "unfold": cut(lambda x, dim, size, step: {dim: None}),
    "index": cut(lambda x, indices: {d: None for d, i in enumerate(indices) if i is not None}),
}
