"""MACs from the number of channels in each layer, where that is enough to know them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .channels import Channels
from .tracing import PIN

#: One side of a call: `fixed` channels, and (multiple, row) for each layer with a share in it.
_Side = tuple[int, tuple[tuple[int, int], ...]]


def shares_channels(channels: Channels, names: Sequence[str]) -> bool:
    """Whether one of these layers shares channels with another layer, or has some that must
    stay.
    """
    users = torch.zeros(channels.graph.count, dtype=torch.long, device="cpu")
    for labels in channels.layers.values():
        users += torch.bincount(labels, minlength=users.numel())
    mine = [channels.layers[name] for name in names]
    return any(bool(((users[labels] != 1) | (labels == PIN)).any()) for labels in mine)


class Widths:
    """Multiply-accumulates of the network as a function of its layers' widths.

    Calls whose sides have at most one layer each, the usual ones, are a table of numbers; the last
    width, always 0, stands for no layer.
    """

    def __init__(self, channels: Channels, names: Sequence[str]) -> None:
        """Use `of`, which says whether this can be made."""
        self._fixed = channels.graph.fixed_macs
        self._plain: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._others: list[tuple[int, int, _Side, _Side]] = []
        for call in channels.graph.projections:
            if not call.counted:
                continue
            sides = [_side(channels, names, ids) for ids in (call.inputs, call.outputs)]
            factor = call.positions * call.taps
            if call.depthwise:  # MACs grow with the outputs alone
                sides[0] = (1, ())
            groups = 1 if call.depthwise else call.groups
            if all(len(terms) <= 1 for _, terms in sides):
                (fixed, terms), (fixed_out, terms_out) = sides
                (multiple, row), (multiple_out, row_out) = (
                    found[0] if found else (0, -1) for found in (terms, terms_out)
                )
                self._plain.append(
                    (factor, groups, fixed, multiple, row, fixed_out, multiple_out, row_out)
                )
            else:
                self._others.append((factor, groups, sides[0], sides[1]))

    @classmethod
    def of(cls, channels: Channels, names: Sequence[str]) -> "Widths | None":
        """None where the channels of one layer are not all read and written alike."""
        try:
            return cls(channels, names)
        except _Unlike:
            return None

    def macs(self, widths: Sequence[int]) -> int:
        """MACs with so many channels in each layer."""
        w = (*widths, 0)
        total = self._fixed
        for factor, groups, fixed, multiple, row, fixed_out, multiple_out, row_out in self._plain:
            n_in = (fixed + multiple * w[row]) // groups
            total += factor * n_in * (fixed_out + multiple_out * w[row_out])
        for factor, groups, (fixed, terms), (fixed_out, terms_out) in self._others:
            n_in = fixed + sum(multiple * w[row] for multiple, row in terms)
            n_out = fixed_out + sum(multiple * w[row] for multiple, row in terms_out)
            total += factor * (n_in // groups) * n_out
        return total


class _Unlike(Exception):
    """The channels of one layer are not read alike."""


def _side(channels: Channels, names: Sequence[str], ids: Tensor) -> _Side:
    times = torch.bincount(channels.label[ids], minlength=channels.graph.count)
    terms, fixed = [], ids.numel()
    for row, name in enumerate(names):
        each = times[channels.layers[name]]
        multiple = int(each[0])
        if bool((each != multiple).any()):
            raise _Unlike
        if multiple:
            terms.append((multiple, row))
            fixed -= multiple * each.numel()
    return fixed, tuple(terms)
