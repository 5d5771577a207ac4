"""A profile in words: its table, and what could be done where fewer operations are not faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .profiling import LayerTime, Profile

#: A layer is pointed out if it saves less than this part of the time that its share promises,
MET = 0.5
#: and what it loses is at least this part of the slim model's time.
MATTERS = 0.01
#: Widths that fill the vector units of most machines are multiples of it.
STEP = 8


def short(layer: LayerTime, total_ms: float) -> bool:
    """Whether a layer is not as much faster as it should be, and that counts."""
    promised = (1 - layer.share) * layer.ms_before
    saved = layer.ms_before - layer.ms
    return saved < MET * promised and layer.lost_ms > MATTERS * total_ms


def hints(layers: Sequence[LayerTime], ms_before: float, ms: float, share: float) -> list[str]:
    """What could be done, the largest loss first.

    Args:
        layers: those that pruning changed.
        ms_before, ms: time of the whole model, before and after.
        share: the share of multiply-accumulates that is left.
    """
    found: list[tuple[float, str]] = []
    flagged = [layer for layer in layers if short(layer, ms)]
    put_back = [layer for layer in flagged if layer.put_back]
    computing = [layer for layer in flagged if layer.macs_before]
    odd = [layer for layer in computing if _odd(layer)]
    rest = [layer for layer in computing if layer not in odd]
    if put_back:
        text = (
            "their outputs have the full width again, which is memory traffic: "
            "residual='keep' or 'couple', or torch.compile, which fuses it with the addition"
        )
        found.append((_lost(put_back), f"{_named(put_back, 'norm', 'put channels back')}: {text}"))
    if odd:
        text = f"widths that are no multiples of {STEP}: plan with round_to={STEP} or more"
        found.append((_lost(odd), f"{_named(odd, 'layer', 'gain little')}: {text}"))
    if rest:
        text = (
            "their widths are not the reason; memory traffic or the cost of a call may be: larger "
            "batches, or other layers to prune"
        )
        found.append((_lost(rest), f"{_named(rest, 'layer', 'gain little')}: {text}"))
    outside = ms - sum(layer.ms for layer in layers)
    if ms_before - ms < MET * (1 - share) * ms_before and outside > ms / 2:
        text = f"{outside:.3g} of {ms:.3g} ms are spent outside the layers that were pruned"
        found.append((outside, text))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def _odd(layer: LayerTime) -> bool:
    """Whether pruning left it with a width that fills no vectors."""
    widths = zip(layer.channels_before, layer.channels, strict=True)
    return any(now != before and now % STEP for before, now in widths)


def _lost(layers: Sequence[LayerTime]) -> float:
    return sum(layer.lost_ms for layer in layers)


def _named(layers: Sequence[LayerTime], noun: str, verb: str) -> str:
    worst = sorted(layers, key=lambda layer: -layer.lost_ms)
    names = ", ".join(layer.name for layer in worst[:3]) + (" …" if len(worst) > 3 else "")
    plural = "s" if len(layers) > 1 else ""
    return f"{len(layers)} {noun}{plural} that {verb} ({names}) lose {_lost(layers):.2g} ms"


def table(profile: Profile) -> str:
    """A profile as people read it: layers with multiply-accumulates and norms that put channels
    back, line by line; then all others, and the whole.
    """
    shown = [layer for layer in profile.layers if layer.macs_before or layer.put_back]
    others = [layer for layer in profile.layers if layer not in shown]
    width = max([len(layer.name) for layer in shown] + [len("other changed layers")])
    head = f"{'layer':<{width}}  {'channels':>22}  {'expected':>8} {'measured':>8}"
    lines = [f"{head}  {'ms before':>9} {'ms':>9}"]
    for layer in shown:
        note = "  not faster accordingly" if short(layer, profile.ms) else ""
        channels = f"{_widths(layer.channels_before)} → {_widths(layer.channels)}"
        expected = 1 / layer.share if layer.share else float("inf")
        lines.append(_line(layer.name, width, channels, expected, layer.ms_before, layer.ms) + note)
    if others:
        before, after = (sum(ms) for ms in zip(*((x.ms_before, x.ms) for x in others), strict=True))
        lines.append(_line("other changed layers", width, "", None, before, after))
    outside = [
        whole - sum(parts)
        for whole, parts in (
            (profile.ms_before, [x.ms_before for x in profile.layers]),
            (profile.ms, [x.ms for x in profile.layers]),
        )
    ]
    lines.append(_line("all the rest", width, "", None, *outside))
    whole = (profile.expected, profile.ms_before, profile.ms)
    lines.append(_line("whole model", width, "", *whole))
    lines.append(
        f"{profile.macs_before:,} → {profile.macs:,} MACs; medians in eval mode on "
        f"{profile.device}, {profile.threads} CPU thread(s), inputs {_shapes(profile.inputs)}"
    )
    return "\n".join([*lines, *(f"hint: {hint}" for hint in profile.hints)])


def _line(
    name: str, width: int, channels: str, expected: float | None, before: float, after: float
) -> str:
    promised = "" if expected is None else f"{expected:.2f}×"
    measured = f"{before / after:.2f}×" if before > 0 and after > 0 else "—"
    speedups = f"{promised:>8} {measured:>8}"
    return f"{name:<{width}}  {channels:>22}  {speedups}  {before:>9.3f} {after:>9.3f}"


def _widths(channels: Sequence[int]) -> str:
    return "×".join(map(str, channels))


def _shapes(spec: object) -> str:
    """The shapes in a description of inputs."""
    found: list[str] = []

    def walk(part: object) -> None:
        if isinstance(part, dict):
            if "shape" in part:
                found.append("×".join(map(str, part["shape"])))
                return
            for child in part.values():
                walk(child)
        elif isinstance(part, list):
            for child in part:
                walk(child)

    walk(spec)
    return ", ".join(found)
