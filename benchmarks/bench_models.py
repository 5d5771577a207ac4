"""docs/models.md: every network of the conformance suite × keep, expand, couple, and what
torch-pruning and torch-kirigami make of the same channels.

    OMP_NUM_THREADS=1 python benchmarks/bench_models.py --write docs/models.md
        [--models REGULAR-EXPRESSION]   only these rows; the others stay as they were
        [--ours]                        what peers make of them stays as it was, too

With --models zoo: the networks of other packages, of which peers are not asked; run it with
.venv-zoo/bin/python, which `make test-zoo` makes.

Figures are kept in benchmarks/results/models.json, from which the page is written. All networks
take about an hour and a half on one core, and 10 GB of memory.
"""

import argparse
import copy
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from conformance import checks, oracles  # noqa: E402
from conformance.models import ALL, Case, chosen  # noqa: E402
from conformance.peers import Kirigami, TorchPruning  # noqa: E402
from conformance.pruners import MODES, Polarfast, Pruner  # noqa: E402
from conformance.zoo import ZOO  # noqa: E402
from models_page import page  # noqa: E402

import polarfast as pf  # noqa: E402

RESULTS = HERE / "results" / "models.json"
PEERS = {"torch-pruning": TorchPruning(), "torch-kirigami": Kirigami()}
#: CPU seconds after which a peer is not waited for.
PATIENCE = 30
SLOW = f"not done after {PATIENCE} s"


class OutOfPatience(BaseException):
    """A peer takes too long; no `except Exception` of its own takes this for an error."""


@dataclass
class Peer:
    """One peer on one network: error of the zero test as a share of the output's variation, share
    of MACs cut, seconds; or why there are none."""

    error: float | None = None
    cut: float | None = None
    seconds: float | None = None
    failure: str = ""


@dataclass
class Row:
    """One network in one mode. `zero` and `beta` are errors as shares of the output's variation;
    `layers` and `gammas` are those that take part, `pinned` the share of all γ that do not.
    """

    model: str
    mode: str
    layers: int | None = None
    gammas: int | None = None
    pinned: float | None = None
    cut: float | None = None
    zero: float | None = None
    beta: float | None = None
    inexact: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""
    peers: dict[str, Peer] = field(default_factory=dict)


def measure(case: Case, mode: str, peers: Mapping[str, Pruner | None]) -> Row:
    """Prune one network and have these peers prune it (None: known to take too long)."""
    row = Row(case.name, mode)
    try:
        _measure(row, case, peers)
    except Exception as error:  # whatever it is, it belongs into the table
        row.failure = describe(error)
    return row


def _measure(row: Row, case: Case, peers: Mapping[str, Pruner | None]) -> None:
    ours, mode = Polarfast(), row.mode
    scales = pf.scaling_factors(checks.prepared(case), case.inputs(), residual=mode)
    every = scales.numel() + sum(gamma.numel() for gamma in scales.others.values())
    row.layers, row.gammas, row.pinned = len(scales), scales.numel(), 1 - scales.numel() / every
    trial = checks.run(ours, case, mode, "none", beta=True)
    checks.check_removed(trial)
    before = oracles.count_macs(trial.original, trial.inputs)
    row.cut = 1 - oracles.count_macs(trial.pruned.model, trial.inputs) / before
    row.zero = max(trial.errors(beta=True))
    row.seconds = seconds(ours, trial, mode, trial.asked)
    if mode != "expand":  # no peer puts what is left of a branch back at its places
        for name, peer in peers.items():
            row.peers[name] = ask(peer, trial, before) if peer else Peer(failure=SLOW)
    del trial
    with_beta = checks.run(ours, case, mode, "exact", beta=False)
    row.beta = max(with_beta.errors(beta=False))
    why = with_beta.pruned.inexact.values()
    row.inexact = dict(Counter(reason.partition(",")[0] for reason in why))


def ask(peer: Pruner, trial: checks.Trial, before: int) -> Peer:
    """The same channels by a peer's means, in eval mode alone, in which the peers look at a
    network. What it must equal is the original without what it did remove."""
    seen = oracles.running(trial.original, trial.inputs)
    removed = trial.pruned.removed
    channels = {name: gone for name, gone in removed.items() if gone.numel() and name in seen}
    try:
        with patience():
            model = copy.deepcopy(trial.original)
            pruned = peer.prune(model, trial.inputs, "couple", channels, "none")
        reference = oracles.masked(trial.original, pruned.removed, True)
        cut = 1 - oracles.count_macs(pruned.model, trial.inputs) / before
        found = oracles.error(reference, pruned.model, trial.probe)
        with patience():
            took = seconds(peer, trial, "couple", channels)
    except OutOfPatience:
        return Peer(failure=SLOW)
    except Exception as error:  # as above
        return Peer(failure=describe(error))
    return Peer(found, cut, took)


def seconds(pruner: Pruner, trial: checks.Trial, mode: str, channels: Any) -> float:
    """From the network to the pruned one, in float32: the least of up to 3 runs."""
    inputs, best, spent = trial.inputs.float(), float("inf"), 0.0
    for _ in range(3):
        model = copy.deepcopy(trial.original).float()
        start = time.process_time()
        pruner.prune(model, inputs, mode, channels, "none")
        took = time.process_time() - start
        best, spent = min(best, took), spent + took
        if spent > 1:
            break
    return best


@contextmanager
def patience() -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise OutOfPatience

    signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def describe(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:70]}{'…' if len(text) > 70 else ''}"


def load() -> tuple[dict[tuple[str, str], Row], dict[str, str]]:
    """The rows, and the versions of the peers in them."""
    if not RESULTS.exists():
        return {}, {}
    data = json.loads(RESULTS.read_text())
    rows = [Row(**each) for each in data["rows"]]
    for row in rows:
        row.peers = {name: Peer(**each) for name, each in row.peers.items()}  # type: ignore[arg-type]
    return {(row.model, row.mode): row for row in rows}, data["versions"]


def save(rows: dict[tuple[str, str], Row], versions: dict[str, str]) -> None:
    names = [*ALL, *ZOO]
    order = sorted(rows, key=lambda key: (names.index(key[0]), MODES.index(key[1])))
    for key in order:  # those measured last are not always the last of the table
        rows[key] = rows.pop(key)
    data = {"versions": versions, "rows": [asdict(row) for row in rows.values()]}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", default="all", help="fast, all, zoo or a regular expression")
    parser.add_argument("--ours", action="store_true", help="leave the peers' figures alone")
    parser.add_argument("--write", type=Path, help="the page to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, versions = load()
    for case in chosen(arguments.models):
        peers: dict[str, Pruner | None] = {}
        if not arguments.ours and case.name not in ZOO:
            peers |= PEERS
        versions |= {name: metadata.version(name) for name in peers}
        for mode in MODES:
            row = measure(case, mode, peers)
            peers |= {name: None for name, peer in row.peers.items() if peer.failure == SLOW}
            if arguments.ours and (case.name, mode) in rows:
                row.peers = rows[case.name, mode].peers
            rows[case.name, mode] = row
            print(json.dumps(asdict(row)), flush=True)
            save(rows, versions)
    if arguments.write:
        ours, zoo = ([row for row in rows.values() if (row.model in ZOO) == own] for own in (0, 1))
        arguments.write.write_text(page(ours, zoo, versions, PATIENCE))


if __name__ == "__main__":
    main()
