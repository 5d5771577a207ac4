"""What the readers of removed channels see, and how each of them takes it over."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kernels.gather import gather_channels
from .tracing import ProjectionCall

#: A field counts as one constant (or as proportional to another field) up to this share of its
#: largest value: float64 rounding.
TOLERANCE = 1e-11
DEPENDS, DIFFERS = "depends on the input", "differs from place to place"


@dataclass
class Field:
    """What one reader sees in R removed channels.

    Attributes:
        values: float64 [R, places], of the first sample; [R, 1] where none differs from place to
            place.
        level: float64 [R], the one value that stands for each best.
        off: float64 [R], how far any is from it at most.
        largest: the largest absolute value.
        varies: whether the samples differ.
        middle: `level` is the value in the middle, not the mean.
    """

    values: Tensor
    level: Tensor
    off: Tensor
    largest: float
    varies: bool
    middle: bool

    def differs_from(self, other: "Field") -> bool:
        """Whether another run showed something else."""
        places, others = self.values.shape[1], other.values.shape[1]
        if self.varies or other.varies or (places != others and 1 not in (places, others)):
            return True
        apart = (self.values - other.values).abs().max()
        return not float(apart) <= self.largest * TOLERANCE

    def problem(self) -> str | None:
        """Why a channel is not one value, if so."""
        return DIFFERS if self.values.shape[1] > 1 else None


def observe(seen: Tensor, in_the_middle: bool) -> Field:
    """Sum up what a call reads.

    Args:
        seen: float64 [N, R, ...].
        in_the_middle: the value in the middle stands for the others, not their mean: a zero-padded
            reader sees something else at the border anyway.
    """
    flat = seen.flatten(2) if seen.dim() > 2 else seen.unsqueeze(2)
    low, high = flat.amin((0, 2)).cpu(), flat.amax((0, 2)).cpu()
    largest = float(torch.maximum(low.abs(), high.abs()).max())
    limit = largest * TOLERANCE
    if bool((high - low <= limit).all()):
        values = flat[0, :, :1].cpu()
        return Field(values, values[:, 0], torch.zeros_like(low), largest, False, in_the_middle)
    level = flat.mean((0, 2))
    if in_the_middle:
        middle = seen
        for size in seen.shape[2:]:
            middle = middle.select(2, size // 2)
        level = middle.mean(0)
    level = level.cpu()
    varies = len(flat) > 1 and not bool(((flat - flat[:1]).abs() <= limit).all())
    off = torch.maximum((high - level).abs(), (low - level).abs())
    return Field(flat[0].cpu(), level, off, largest, varies, in_the_middle)


@dataclass
class ReaderFold:
    """How one reader takes over the constants of the removed channels that it read.

    Attributes:
        weight: the reader's parameter name.
        sink: the tensor that takes up what the constants add to the reader's output; None: nothing
            does (it is cancelled, or it is lost).
        shifted: input positions whose constants `sink` takes up.
        level: float64, the one value that each of `shifted` counts as.
        shift: float64 [C_out], what goes into `sink` where that is not the reader's own weights
            times `level`.
        columns: constant channel's position -> removed channels' positions that it stands for, and
            each one's multiple of the constant channel.
        note: why the fold is not exact; None if it is.
    """

    weight: str
    sink: str | None = None
    shifted: Tensor | None = None
    level: Tensor | None = None
    shift: Tensor | None = None
    columns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    note: str | None = None

    @property
    def adds(self) -> bool:
        """Whether anything goes into `sink`."""
        return self.sink is not None and (self.level is not None or self.shift is not None)

    def take(self, positions: Tensor, level: Tensor, note: str | None) -> None:
        """Let `sink` take up one value for each of these removed channels."""
        self.shifted, self.level, self.note = positions, level, note


@dataclass
class Fold:
    """All constants of a network.

    Attributes:
        readers: by index into `graph.projections`.
        constant: classes that stay as constant channels (in a grouped convolution, one channel per
            group).
        lasting: whether it would be the same with other weights of convolutions and linear layers.
    """

    readers: dict[int, ReaderFold] = field(default_factory=dict)
    constant: set[int] = field(default_factory=set)
    lasting: bool = True

    def notes(self) -> dict[str, str]:
        """Reader's weight name -> why its fold is not exact."""
        return {reader.weight: reader.note for reader in self.readers.values() if reader.note}


def shift_of(
    call: ProjectionCall, weight: Tensor, reader: ReaderFold, rows: Tensor | None = None
) -> Tensor:
    """What a reader's folded constants add to its output channels.

    Args:
        call: the reader.
        weight: its full-size weight, of any floating point dtype.
        reader: its fold; `adds` is True.
        rows: output channels asked for; by default, all.

    Returns:
        Float64 [C_out] or [rows], on the CPU, new.
    """
    if reader.shift is not None:
        return reader.shift.clone() if rows is None else reader.shift[rows]
    assert reader.level is not None and reader.shifted is not None
    level, positions = reader.level.to(weight.device), reader.shifted.to(weight.device)
    if call.groups == 1 and not call.transposed:
        used = gather_channels(weight.detach(), rows, positions).double()
        return ((used.flatten(2).sum(2) if used.dim() > 2 else used) @ level).cpu()
    taps = weight.detach().double()
    value = torch.zeros(call.inputs.numel(), dtype=torch.float64, device=weight.device)
    value[positions] = level
    if call.transposed:
        taps = taps.flatten(2).mean(2) if taps.dim() > 2 else taps
        per_group = taps.view(call.groups, -1, taps.shape[1]) * value.view(call.groups, -1, 1)
        shift = per_group.sum(1).flatten().cpu()
        return shift if rows is None else shift[rows]
    taps = taps.flatten(2).sum(2) if taps.dim() > 2 else taps
    per_group = taps.view(call.groups, -1, taps.shape[1]) * value.view(call.groups, 1, -1)
    shift = per_group.sum(2).flatten().cpu()
    return shift if rows is None else shift[rows]
