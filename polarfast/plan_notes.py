"""What the readers of a plan should know about each layer."""

from collections.abc import Mapping

from torch import Tensor

from .fields import Fold
from .limits import Limits
from .scores import Ranking
from .selection import LAST, Selection

#: A layer that keeps a smaller share of its channels is pointed out.
ALMOST_NOTHING = 0.05
#: Where γ have parted, few lie so closely above a valley's threshold.
GAP = 0.05

Notes = dict[str, list[str]]  # γ name -> what to know


def limit_notes(choice: Selection) -> Notes:
    """What came back for the limits, and what nothing reads."""
    found: Notes = {}
    for name, first, now in zip(choice.layers, choice.first, choice.counts(), strict=True):
        mine = found[name] = []
        if name in choice.unread:
            mine.append("nothing reads it any more")
            if not now:
                continue
        reasons = dict(choice.added[name])
        if reasons.pop(LAST, 0):
            mine.append(LAST)
        coupled = now - first - sum(choice.added[name].values())
        if coupled > 0:
            reasons["coupled layers"] = coupled
        if reasons:
            several = len(reasons) > 1
            each = [f"{number} {why}" if several else why for why, number in reasons.items()]
            mine.append(f"{sum(reasons.values())} added back ({', '.join(each)})")
    return found


def note_crowds(
    notes: Notes,
    compared: Mapping[str, Tensor],
    bounds: Mapping[str, float | None],
    gaps: bool,
) -> None:
    """Point out layers without a valley, and (`gaps`) those whose threshold runs through γ that
    have not parted: of these, most of what stays is hardly larger than what goes, and what goes may
    be missed. Single γ on their way to one side are harmless.
    """
    for name, bound in bounds.items():
        if bound is None:
            notes[name].insert(0, "no valley: nothing removed")
            continue
        above = compared[name][compared[name] > bound]
        near = int((above <= bound + GAP).sum())
        crowded = near and 2 * near >= above.numel() and above.numel() < compared[name].numel()
        if gaps and crowded:
            notes[name].append(
                f"no gap: {near} of {above.numel()} above the threshold lie within {GAP:g} of it"
            )


def note_ranking(notes: Notes, ranking: Ranking, count: int) -> None:
    """Say where the share asked for goes on above a valley, or between equal γ."""
    above, ties = ranking.above_valleys(count), ranking.ties(count)
    for name, mine in notes.items():
        if above[name]:
            mine.insert(0, f"{above[name]} above its valley go, to reach the share to cut")
        if ties[name]:
            mine.insert(0, f"{ties[name]} equal to the threshold stay, the first ones")


def note_widths(notes: Notes, choice: Selection, folded: Fold, limits: Limits) -> None:
    """Say where a width cannot be a multiple of `round_to`, which layers keep almost nothing, and
    which keep nothing.
    """
    constant = choice.positions(folded.constant)
    for (name, labels), kept in zip(choice.layers.items(), choice.counts(), strict=True):
        full, multiple = labels.numel(), limits.round_to[name]
        width = kept + len(constant[name])
        if width % multiple:
            why = f"fewer than {multiple}" if full < multiple else f"no multiple of {multiple}"
            notes[name].append(f"whole, since {full} channels are {why}")
        if 0 < kept < ALMOST_NOTHING * full:
            notes[name].append("almost everything goes: is λ too strong here?")
        if not kept:
            notes[name].append("branch is constant" if constant[name] else "branch disappears")
