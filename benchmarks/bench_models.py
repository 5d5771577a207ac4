"""docs/models.md: every network of the conformance suite × keep, expand, couple, and what
torch-pruning and torch-kirigami make of the same channels.

    OMP_NUM_THREADS=1 python benchmarks/bench_models.py --write docs/models.md
        [--models REGULAR-EXPRESSION]   only these rows; the others stay as they were

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
from collections.abc import Collection, Iterator
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
from models_page import page  # noqa: E402

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
    """One network in one mode. `zero` and `beta` are errors as shares of the output's variation."""

    model: str
    mode: str
    cut: float | None = None
    zero: float | None = None
    beta: float | None = None
    inexact: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""
    peers: dict[str, Peer] = field(default_factory=dict)


def measure(case: Case, mode: str, slow: Collection[str] = ()) -> Row:
    """Prune one network and have the peers prune it, but for those that are known to be `slow`."""
    row = Row(case.name, mode)
    try:
        _measure(row, case, slow)
    except Exception as error:  # whatever it is, it belongs into the table
        row.failure = describe(error)
    return row


def _measure(row: Row, case: Case, slow: Collection[str]) -> None:
    ours, mode = Polarfast(), row.mode
    trial = checks.run(ours, case, mode, "none", beta=True)
    checks.check_removed(trial)
    before = oracles.count_macs(trial.original, trial.inputs)
    row.cut = 1 - oracles.count_macs(trial.pruned.model, trial.inputs) / before
    row.zero = oracles.error(trial.original, trial.pruned.model, trial.probe)
    row.seconds = seconds(ours, trial, mode, trial.asked)
    if mode != "expand":  # no peer puts what is left of a branch back at its places
        for name, peer in PEERS.items():
            row.peers[name] = ask(peer, trial, before) if name not in slow else Peer(failure=SLOW)
    del trial
    with_beta = checks.run(ours, case, mode, "exact", beta=False)
    row.beta = with_beta.error(beta=False)
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


def load() -> dict[tuple[str, str], Row]:
    if not RESULTS.exists():
        return {}
    rows = [Row(**data) for data in json.loads(RESULTS.read_text())["rows"]]
    for row in rows:
        row.peers = {name: Peer(**data) for name, data in row.peers.items()}  # type: ignore[arg-type]
    return {(row.model, row.mode): row for row in rows}


def save(rows: dict[tuple[str, str], Row]) -> None:
    names = list(ALL)
    order = sorted(rows, key=lambda key: (names.index(key[0]), MODES.index(key[1])))
    for key in order:  # those measured last are not always the last of the table
        rows[key] = rows.pop(key)
    data = {"rows": [asdict(row) for row in rows.values()]}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", default="all", help="regular expression of names, fast or all")
    parser.add_argument("--write", type=Path, help="the page to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = load()
    for case in chosen(arguments.models):
        slow: set[str] = set()
        for mode in MODES:
            rows[case.name, mode] = row = measure(case, mode, slow)
            slow |= {name for name, peer in row.peers.items() if peer.failure == SLOW}
            print(json.dumps(asdict(row)), flush=True)
            save(rows)
    if arguments.write:
        versions = {name: metadata.version(name) for name in PEERS}
        arguments.write.write_text(page(rows, versions, PATIENCE))


if __name__ == "__main__":
    main()
