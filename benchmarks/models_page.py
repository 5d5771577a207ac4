"""docs/models.md from the figures of bench_models.py."""

import re
from collections import Counter
from statistics import median
from typing import Any

TOLERANCE = 1e-10
HEAD = """# Which networks, and how exactly

Written by `python benchmarks/bench_models.py --write docs/models.md`; no figure here is typed in.
Every network is torchvision's or timm's own (with 10 classes and random weights, 64 pixels,
Inception 128), and no rule in polarfast knows a network's name.

The assertions behind the table are a test suite, which a stranger can point at another pruner: two
methods of `conformance.pruners.Pruner` to write, three more for what a library offers beyond.

    pytest tests/conformance --models all
    pytest tests/conformance/test_networks.py --models 'resnet.*' \\
        --pruner conformance.peers:TorchPruning

Half of the channels of every layer that takes part are removed, one of every two neighbours.
γ and β are a BatchNorm's weight and bias; the mode is [what happens at
additions](which-channels.md).

- **MACs cut**: share of multiply–accumulates, counted by torch's `FlopCounterMode`. "couple" asks
  for the same channels in all layers of one width, so that those which are added together go
  together.
- **zero test**: γ = β = 0 on the removed channels (and wherever these pass through a depthwise
  convolution's BatchNorm), everything else random. Largest difference of any output from the
  original's, in float64, as a share of how much that output varies over inputs, at the size of the
  example and at a larger one. Up to {tolerance:g} it is rounding.
- **β ≠ 0**: γ = 0 alone, β from a normal distribution with standard deviation 1, `fold="exact"`:
  the same error against the original with these γ = 0.
- **exact**: "yes" if both are rounding; else how many layers read something that cannot be folded,
  and why (`plan.inexact` names each). These β are as large as what the norms put out, and at 64
  pixels most places are near a border: both make the errors large. Gates
  ([pf.add_gates](what-the-slim-model-equals.md#gates)) silence β and leave nothing to fold.
- **time**: trace, plan and slim (`verify=False`) in float32, CPU seconds on one thread.
- **torch-pruning** {tp} (`BNScalePruner`, half of every layer in which we remove channels) and
  **torch-kirigami** {tk} (`plan_remove` of the same channels): error of the same zero test, and
  time, measured in the same way, at the size of the example. They are compared with the original
  without what they did remove; the share of MACs cut is given where it is another than ours.
  Neither puts a pruned branch back at its places ("expand"), keeps β, or prunes heads that run in
  train mode only. A peer is stopped after {patience} s.

"""
COLUMNS = (
    "network", "mode", "MACs cut", "zero test", "β ≠ 0", "exact", "time",
    "torch-pruning", "torch-kirigami",
)  # fmt: skip
ZOO_HEAD = """
## Networks of other packages

As their packages build them from their configurations, with random weights and small inputs: [the
suite](../tests/conformance/zoo.py), [the versions](../tests/conformance/requirements-zoo.txt).
`make test-zoo` installs and asserts, `.venv-zoo/bin/python benchmarks/bench_models.py --models zoo`
measures. **γ** are those that take part, in so many layers; **pinned** is the share of all γ that
do not, which `scales.pinned` gives reasons for. The other columns are as above.

"""
ZOO_COLUMNS = (
    "network", "mode", "γ", "pinned", "MACs cut", "zero test", "β ≠ 0", "exact", "time"
)  # fmt: skip


def page(rows: list[Any], zoo: list[Any], versions: dict[str, str], patience: int) -> str:
    """The whole page.

    Args:
        rows: of bench_models.py.
        zoo: those of other packages' networks.
        versions: of the peers.
        patience: seconds that a peer was given.
    """
    head = HEAD.format(
        tolerance=TOLERANCE,
        tp=versions["torch-pruning"],
        tk=versions["torch-kirigami"],
        patience=patience,
    )
    lines = [head + summary(rows), peers(rows), "", *_table(COLUMNS, map(_cells, rows))]
    lines += [ZOO_HEAD + summary(zoo), "", *_table(ZOO_COLUMNS, map(_zoo_cells, zoo))]
    return "\n".join(lines) + "\n"


def summary(rows: list[Any]) -> str:
    """What a table comes to, as a list of one item."""
    done = [row for row in rows if not row.failure]
    zero = sum(row.zero < TOLERANCE for row in done)
    exact = sum(row.zero < TOLERANCE and row.beta < TOLERANCE for row in done)
    old = sum(row.layers is None for row in done)
    return (
        f"- {len({row.model for row in rows})} networks, {len(rows)} rows: polarfast equals the "
        f"original in the zero test in {zero} and keeps every β in {exact}; {len(rows) - len(done)}"
        " refused or failed, with the reason."
    ) + (f"\n- {old} rows were last measured at the size of the example alone." if old else "")


def peers(rows: list[Any]) -> str:
    """What the peers come to, as a list."""
    done, text = [row for row in rows if not row.failure], []
    for peer in COLUMNS[-2:]:
        tried = [row.peers[peer] for row in done if peer in row.peers]
        right = sum(one.error is not None and one.error < TOLERANCE for one in tried)
        failed = sum(one.error is None for one in tried)
        pairs = [(row.seconds, row.peers[peer].seconds) for row in done if peer in row.peers]
        ratios = sorted(theirs / ours for ours, theirs in pairs if theirs is not None)
        text.append(
            f"- {peer}, of {len(tried)} rows: {right} equal, {len(tried) - right - failed} "
            f"different, {failed} failed or not done in time. Its time is {ratios[0]:.2g} to "
            f"{ratios[-1]:.2g} times ours (median {median(ratios):.2g})."
        )
    return "\n".join(text)


def _error(share: float) -> str:
    return f"{share:.0e}" if share else "0"


def _cells(row: Any) -> list[str]:
    if row.failure:
        return [row.model, row.mode, "", "", "", row.failure, "", "", ""]
    return [row.model, row.mode, *_own(row), *(_peer(row, name) for name in COLUMNS[-2:])]


def _zoo_cells(row: Any) -> list[str]:
    if row.failure:
        return [row.model, row.mode, "", "", "", "", "", row.failure, ""]
    taking_part = f"{row.gammas} in {row.layers} layers"
    return [row.model, row.mode, taking_part, f"{row.pinned:.0%}", *_own(row)]


def _own(row: Any) -> list[str]:
    """What polarfast makes of a network."""
    whys: Counter[str] = Counter()
    for why, count in row.inexact.items():
        whys[re.sub(r"\S+\.bias", "its bias", why)] += count
    reasons = ", ".join(f"{count} × {why}" for why, count in whys.items())
    exact = "yes" if row.zero < TOLERANCE and row.beta < TOLERANCE else f"no: {reasons}"
    seconds = f"{row.seconds:.2f} s"
    return [f"{row.cut:.0%}", _error(row.zero), _error(row.beta), exact, seconds]


def _peer(row: Any, name: str) -> str:
    if name not in row.peers:
        return "not offered"
    peer = row.peers[name]
    if peer.failure:
        return peer.failure
    other = "" if abs(peer.cut - row.cut) < 0.005 else f", cuts {peer.cut:.0%}"
    return f"{_error(peer.error)}{other}, {peer.seconds:.2f} s"


def _table(columns: tuple[str, ...], rows: Any) -> list[str]:
    return [_line(columns), _line("---" for _ in columns), *map(_line, rows)]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
