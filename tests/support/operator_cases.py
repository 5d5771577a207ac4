"""Operators of torch's database with channels along some dimension of their arguments: what the
tracer says that their results depend on, and what they do depend on.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from polarfast.running import plain_eager
from polarfast.tracing.dryrun import _DryRun
from polarfast.tracing.graph import PIN
from polarfast.tracing.recorder import Recorder, spread
from polarfast.tracing.sizes import SizeTracking

LARGEST = 20_000  # elements of a sample's tensors, and
CHANNELS = 24  # of the dimension that channels are taken along
#: What operators raise on arguments that they do not take.
REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError)


@dataclass(eq=False)
class Case:
    """An operator with arguments.

    Attributes:
        function: the operator, of `leaves` put back into the structure `spec` of (args, kwargs).
        channels: which of the leaves have channels -> the dimension that these are along.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    channels: dict[int, int]

    def run(self, leaves: Sequence[Any] | None = None) -> tuple[list[Any], list[Tensor]]:
        """The leaves (copies, in case they are changed in place), and all tensors that come out."""
        leaves = [_copy(leaf) for leaf in (self.leaves if leaves is None else leaves)]
        return leaves, self.call(leaves)

    def call(self, leaves: list[Any]) -> list[Tensor]:
        torch.default_generator.manual_seed(0)  # torch.manual_seed asks every kind of device
        args, kwargs = tree_unflatten(leaves, self.spec)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = self.function(*args, **kwargs)
        found = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        return found + [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def with_channels(self, chosen: dict[int, Tensor]) -> list[Any]:
        """The leaves with these channels only."""
        return [
            leaf.index_select(self.channels[i], chosen[i]) if i in chosen else leaf
            for i, leaf in enumerate(self.leaves)
        ]

    def changed(self, leaf: int, channel: int) -> Iterator[list[Any]]:
        """The leaves with one channel's values changed: mixed with other values of its tensor,
        which an operator takes too; all 0, and large.
        """
        whole, dim = self.leaves[leaf], self.channels[leaf]
        own, generator = whole.select(dim, channel), torch.Generator().manual_seed(1)
        places = torch.randint(whole.numel(), own.shape, generator=generator)
        share = torch.rand(own.shape, generator=generator, dtype=torch.float64).to(whole.dtype)
        mixed = whole.reshape(-1)[places] * share + own * (1 - share)
        for values in (mixed, 0 * own, 100 * own + 7, -100 * own - 7):
            copy = whole.clone()
            copy.select(dim, channel).copy_(values)
            yield [*self.leaves[:leaf], copy, *self.leaves[leaf + 1 :]]


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def samples(op: Any, count: int) -> list[Any]:
    """So many of the first samples of an operator, of every kind that there is among them."""
    dtype = next((t for t in (torch.float64, torch.float32) if t in op.dtypes), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(itertools.islice(op.sample_inputs("cpu", dtype), 12 * count))
    return found[:: max(1, len(found) // count)][:count]


def cases(op: Any, in_place: bool, count: int) -> Iterator[Case]:
    """Channels along each dimension of each argument alone, then of all arguments at once."""
    function = op.inplace_variant if in_place else op.op
    for sample in samples(op, count):
        leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(each.layout != torch.strided for each in tensors):
            continue
        if sum(each.numel() for each in tensors) <= LARGEST:
            leaves = [_copy(leaf) for leaf in leaves]
            yield from (Case(function, leaves, spec, chosen) for chosen in _channels(leaves))


def _channels(leaves: list[Any]) -> Iterator[dict[int, int]]:
    floats = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    }
    seen = []
    for i, leaf in floats.items():
        for dim in range(leaf.dim()):
            seen.append({i: dim})
    rank = max((leaf.dim() for leaf in floats.values()), default=0)
    for place in range(-rank, rank):  # counted from the last or from the first dimension
        seen.append(
            {
                i: place % leaf.dim()
                for i, leaf in floats.items()
                if -leaf.dim() <= place < leaf.dim() and leaf.shape[place] > 1
            }
        )
    for number, chosen in enumerate(seen):
        sizes = [leaves[i].shape[dim] for i, dim in chosen.items()]
        if sizes and 2 <= min(sizes) <= max(sizes) <= CHANNELS and chosen not in seen[:number]:
            yield chosen


@dataclass(eq=False)
class Said:
    """What the tracer says.

    Attributes:
        channels: leaf -> the class of each of its channels; PIN: it must stay.
        results: the class of each element of each tensor that comes out; None: it depends on no
            channel, and its size on no number of channels.
        reads: the operator is a convolution or linear layer, whose results are new channels.
        balanced: rows of classes of which as many must stay in each.
        reasons: why channels must stay.
    """

    channels: dict[int, Tensor]
    results: list[Tensor | None]
    reads: bool
    balanced: list[Tensor]
    reasons: list[str]

    @property
    def classes(self) -> list[int]:
        """Those that can go."""
        return sorted({int(c) for row in self.channels.values() for c in row} - {PIN})


def ask(case: Case) -> Said:
    """Trace one operator."""
    recorder = Recorder(nn.Module())
    leaves = [_copy(leaf) for leaf in case.leaves]
    rows = {}
    for i, dim in case.channels.items():
        rows[i] = recorder.fresh(leaves[i].shape[dim])
        ids = spread(rows[i], leaves[i].shape, dim)
        recorder.values[leaves[i]] = recorder.start(ids, recorder.node([]))
    with plain_eager(), SizeTracking(recorder), _DryRun(recorder):
        out = case.call(leaves)
    graph = recorder.finish()
    label = _labels(graph)
    values = [recorder.value(tensor) for tensor in out]
    return Said(
        {i: label[row] for i, row in rows.items()},
        [None if value is None else label[value.ids.contiguous()] for value in values],
        bool(graph.projections),
        [label[rows] for rows in graph.balanced],
        sorted({pin.reason for pin in graph.pins} | {match.reason for match in graph.matched}),
    )


def _labels(graph: Any) -> Tensor:
    """Classes where whatever meets goes together, as in residual="couple"."""
    edges = [*graph.links(), *graph.product_edges(), *graph.addition_edges(), *graph.pin_edges()]
    while True:
        label = graph.labels(edges)
        apart = [
            torch.cat((match.left, match.right))
            for match in graph.matched
            if not torch.equal(label[match.left].sort()[0], label[match.right].sort()[0])
        ]
        if all(bool((label[ids] == PIN).all()) for ids in apart):
            return label
        edges += [torch.stack((torch.full_like(ids, PIN), ids)) for ids in apart]


def differ(left: Tensor, right: Tensor) -> Tensor:
    """Which elements differ, by more than rounding."""
    if left.shape != right.shape:
        return torch.ones_like(left, dtype=torch.bool)
    if left.is_complex():
        left, right = (
            torch.view_as_real(left.resolve_conj()),
            torch.view_as_real(right.resolve_conj()),
        )
        return differ(left, right).any(-1)
    if not left.is_floating_point():
        return left != right
    return ~torch.isclose(left, right, rtol=1e-10, atol=1e-12, equal_nan=True)


def dependence(case: Case, leaf: int, channel: int) -> list[Tensor] | None:
    """Which elements of each result depend on a channel; None: its values cannot be changed."""
    _, before = case.run()
    found = None
    for leaves in case.changed(leaf, channel):
        try:
            _, after = case.run(leaves)
        except REFUSALS:
            continue  # the operator does not take such values
        if len(after) == len(before):
            masks = [differ(*pair) for pair in zip(before, after, strict=True)]
            found = masks if found is None else [a | b for a, b in zip(found, masks, strict=True)]
    return found


def less(case: Case, said: Said) -> str | None:
    """Where the tracer says less than the truth; None if it does not."""
    for leaf, row in said.channels.items():
        for channel, label in enumerate(row.tolist()):
            if label == PIN:
                continue
            for number, depends in enumerate(dependence(case, leaf, channel) or []):
                known = said.results[number]
                missed = depends if known is None else depends & (known != label)
                if bool(missed.any()):
                    return f"result {number} depends on channel {channel} of argument {leaf}"
    return None


def cut(case: Case, said: Said, most: int, values: bool = True) -> str | None:
    """Where the operator, given some of the channels, does not return what the tracer says will be
    left; None if it does.

    Args:
        most: how many sets of channels are tried.
        values: compare values too, not sizes only.
    """
    _, whole = case.run()
    for kept in itertools.islice(_choices(said), most):
        stay = torch.tensor([PIN, *kept])
        chosen = {i: torch.isin(row, stay).nonzero()[:, 0] for i, row in said.channels.items()}
        try:
            _, part = case.run(case.with_channels(chosen))
        except REFUSALS as error:
            return f"fails on classes {kept}: {error}"
        if len(part) != len(whole):
            return f"returns {len(part)} results on classes {kept}"
        for number, (full, label, slim) in enumerate(zip(whole, said.results, part, strict=True)):
            left = full if label is None else full[torch.isin(label, stay)]
            if left.numel() != slim.numel():
                return f"result {number} has another size on classes {kept}"
            if values and bool(differ(left.reshape(-1), slim.reshape(-1)).any()):
                return f"result {number} has other values on classes {kept}"
    return None


def _choices(said: Said) -> Iterator[list[int]]:
    """Sets of classes that may stay."""
    classes = said.classes
    count = len(classes)
    tried = [classes[:-1], classes[1:], classes[::2], classes[1::2], classes[: count // 2]]
    few = classes if count <= 8 else []
    for size in range(1, count):
        tried += [list(kept) for kept in itertools.combinations(few, size)]
    seen: list[list[int]] = []
    for kept in tried:
        if 0 < len(kept) < count and kept not in seen and _is_balanced(said, kept):
            seen.append(kept)
            yield kept


def _is_balanced(said: Said, kept: list[int]) -> bool:
    stay = torch.tensor([PIN, *kept])
    counts = [torch.isin(rows, stay).sum(1) for rows in said.balanced]
    return all(bool((count == count[0]).all()) for count in counts)


def stays_apart(case: Case) -> bool:
    """Whether the channels of one argument stay apart in truth: each result depends on one of them
    at most, and without one, what depended on it is missing and all else as before.
    """
    ((leaf, dim),) = case.channels.items()
    _, whole = case.run()
    of = [torch.full(tensor.shape, -1) for tensor in whole]
    for channel in range(case.leaves[leaf].shape[dim]):
        depends = dependence(case, leaf, channel)
        if depends is None:
            return False
        for mask, owner in zip(depends, of, strict=True):
            if bool((mask & (owner >= 0)).any()):
                return False
            owner[mask] = channel
    own = len(whole) - sum(isinstance(each, Tensor) for each in case.leaves)
    for gone in range(case.leaves[leaf].shape[dim]):
        stay = torch.tensor([i for i in range(case.leaves[leaf].shape[dim]) if i != gone])
        try:
            _, part = case.run(case.with_channels({leaf: stay}))
        except REFUSALS:
            return False
        if len(part) != len(whole):
            return False
        for full, owner, slim in list(zip(whole, of, part, strict=True))[: max(own, 1)]:
            left = full[owner != gone]
            if left.numel() != slim.numel() or bool(differ(left, slim.reshape(-1)).any()):
                return False
    return True
