"""The figures of a run survive JSON, and the table shows them."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from polarfast.engine.results import Pair, Results, results_table
from polarfast.errors import ArgumentError

RESULTS = Results(
    accuracy_dense=93.5,
    accuracy_pruned=93.25,
    accuracy_finetuned=93.75,
    macs=Pair(125e6, 66e6),
    params=Pair(850e3, 500e3),
    file_bytes=Pair(3.4e6, 2.1e6),
    latency_ms={1: Pair(4.0, 5.0), 64: Pair(80.0, 50.0)},
    epochs=Pair(17, 11.25),
    threads=2,
    verified_error=3e-12,
    seconds=100.0,
    device="Some CPU",
)


def shown(results: Results) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(results, "a title"))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_results_come_back_from_json() -> None:
    assert Results.from_dict(json.loads(json.dumps(RESULTS.to_dict()))) == RESULTS


@pytest.mark.parametrize(
    "change",
    [
        {"macs": {"dense": 1.0}},
        {"latency_ms": {"many": {"dense": 1.0, "slim": 1.0}}},
        {"latency_ms": 3},
        {"flavour": "vanilla"},
    ],
)
def test_what_is_no_results_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="not the results of a run"):
        Results.from_dict(RESULTS.to_dict() | change)


def test_missing_figure_is_named() -> None:
    values = RESULTS.to_dict()
    del values["accuracy_pruned"]
    with pytest.raises(ArgumentError, match="accuracy_pruned"):
        Results.from_dict(values)


def test_table_shows_every_figure() -> None:
    text = shown(RESULTS)
    for part in (
        "93.50 %", "93.25 %", "-0.25 points", "+0.25 points", "125.00 M", "-47.2 %", "850.0 k",
        "1.25× slower", "1.60× faster", "2 threads", "Some CPU", "3e-12", "│ 17 │ 11.2 │ -33.8 % │",
    ):  # fmt: skip
        assert part in text


def test_table_of_a_run_that_trained_no_dense_network() -> None:
    text = shown(dataclasses.replace(RESULTS, accuracy_dense=None))
    assert "93.75 %" in text and "points" not in text
