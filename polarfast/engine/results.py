"""What a run comes to: the figures, and the table that a person shows a colleague."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..documents import (
    DIGEST,
    Check,
    check_fields,
    optional,
    parse_json,
    real,
    text,
    unsealed,
    whole,
)
from ..errors import ArgumentError, FileFormatError
from ..storage import read_text

_NUMBER = real(0, 1e18)
_AMOUNT, _TIME = _NUMBER, real(1e-9, 1e12)
_PERCENT = real(0, 100)
_MAPPING: Check = lambda value: isinstance(value, Mapping)  # noqa: E731
_FIELDS = {
    "accuracy_dense": optional(_PERCENT),
    "accuracy_pruned": _PERCENT,
    "accuracy_finetuned": _PERCENT,
    **dict.fromkeys(("macs", "params", "file_bytes", "epochs"), _MAPPING),
    "latency_ms": lambda value: _MAPPING(value) and all(map(str.isdecimal, map(str, value))),
    "threads": whole(1, 10**6),
    "verified_error": _NUMBER,
    "seconds": _NUMBER,
    "device": text,
}
BATCHES = (1, 64)  # of the measured latencies


@dataclass(frozen=True)
class Pair:
    """One quantity of the dense and of the slim model."""

    dense: float
    slim: float

    @property
    def cut(self) -> float:
        """Share by which the slim model has less."""
        return 1 - self.slim / self.dense if self.dense else 0.0

    @property
    def faster(self) -> str:
        """Of a time: how much faster the slim model is, or slower."""
        if self.slim > self.dense:
            return f"{self.slim / self.dense:.2f}× slower"
        return f"{self.dense / self.slim:.2f}× faster"


@dataclass(frozen=True)
class Results:
    """Figures of a finished run.

    Attributes:
        accuracy_dense: after sparsity training; None where no dense network was trained;
            accuracy_pruned: right after pruning;
            accuracy_finetuned: of the slim model at the end. Percent of the test images.
        macs: multiply-accumulates of one image; params: count; file_bytes: on disk.
        latency_ms: median milliseconds by batch size; threads: that measured it used.
        verified_error: largest relative error of the slim model's output against the pruned dense
            model's, in float64.
        epochs: dense: that were trained, fine-tuning included; slim: what their passes cost, in
            epochs of the dense network.
        seconds: wall time of training, pruning and fine-tuning.
        device: what the latency was measured on, in words; empty: not recorded.
    """

    accuracy_dense: float | None
    accuracy_pruned: float
    accuracy_finetuned: float
    macs: Pair
    params: Pair
    file_bytes: Pair
    latency_ms: dict[int, Pair]
    epochs: Pair
    threads: int
    verified_error: float
    seconds: float
    device: str = ""

    @property
    def measured_on(self) -> str:
        """Device and threads of the latency."""
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        return f"{self.device or 'device not recorded'}, {threads}"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Results":
        """The inverse of :meth:`to_dict`, also after JSON has made strings of the batch sizes.

        Raises:
            ArgumentError: a figure is missing, unknown, or no number.
        """
        try:
            values = dict(check_fields(values, _FIELDS, "the results", ("device",)))
            latency = {int(batch): pair for batch, pair in values["latency_ms"].items()}
            values["latency_ms"] = {batch: _pair(pair, _TIME) for batch, pair in latency.items()}
            for name in ("macs", "params", "file_bytes", "epochs"):
                values[name] = _pair(values[name], _AMOUNT)
            return cls(**values)
        except ValueError as error:
            raise ArgumentError(
                f"these are not the results of a run ({error}); run it again, or read them with the"
                " polarfast that wrote them"
            ) from error


def _pair(values: Any, check: Check) -> Pair:
    return Pair(**check_fields(values, {"dense": check, "slim": check}, "one of its pairs"))


def read_results(path: Path) -> Results:
    """The figures in a run's folder.

    Raises:
        FileFormatError: the file is damaged.
        FileNotFoundError: there is none.
    """
    advice = "run it again, or name another run"
    try:
        data = parse_json(read_text(path, advice))
        if isinstance(data, dict):
            found = Results.from_dict({name: data[name] for name in data if name != DIGEST})
            unsealed(data)
            return found
    except ValueError as error:  # not JSON, or not such figures
        raise FileFormatError(f"'{path}': {error}") from error
    raise FileFormatError(f"'{path}': these are not the results of a run; {advice}")


def results_table(results: Results, title: str) -> Table:
    """Dense beside slim, one quantity a row."""
    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("slim", justify="right", style="bold")
    table.add_column("change", justify="right")
    dense = results.accuracy_dense
    for name, accuracy in (
        ("accuracy, right after pruning", results.accuracy_pruned),
        ("accuracy, fine-tuned", results.accuracy_finetuned),
    ):
        change = "" if dense is None else f"{accuracy - dense:+.2f} points"
        table.add_row(name, _percent(dense), _percent(accuracy), change)
    table.add_section()
    for name, pair, form in (
        ("MACs an image", results.macs, _millions),
        ("parameters", results.params, _thousands),
        ("file", results.file_bytes, _kilobytes),
    ):
        table.add_row(name, form(pair.dense), form(pair.slim), f"{-100 * pair.cut:+.1f} %")
    table.add_section()
    for batch, pair in results.latency_ms.items():
        name = f"latency, batch {batch}"
        table.add_row(name, _ms(pair.dense), _ms(pair.slim), pair.faster)
    table.add_section()
    epochs = results.epochs
    table.add_row(
        "MACs of the whole training, in dense epochs",
        f"{epochs.dense:.0f}",
        f"{epochs.slim:.1f}",
        f"{-100 * epochs.cut:+.1f} %",
    )
    table.caption = (
        f"dense: after sparsity training; latency: median on {results.measured_on}; "
        "right after pruning the slim model equals the dense one with its small γ at "
        f"0, to a relative {results.verified_error:.0e}; {results.seconds:.0f} s in all"
    )
    table.caption_justify = "left"
    return table


def _percent(value: float | None) -> str:
    return "not trained" if value is None else f"{value:.2f} %"


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f} M"


def _thousands(value: float) -> str:
    return f"{value / 1e3:.1f} k"


def _kilobytes(value: float) -> str:
    return f"{value / 1e3:.0f} kB"


def _ms(value: float) -> str:
    return f"{value:.2f} ms"
