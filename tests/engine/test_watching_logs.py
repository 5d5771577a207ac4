"""What the observers write can be read by others: TensorBoard's own reader, any JSON parser."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polarfast.documents import unsealed
from polarfast.engine.histograms import Gammas
from polarfast.engine.watching import Epoch, JsonLog, TensorBoardLog


def epoch(index: int, loss: float = 0.5, with_gammas: bool = True) -> Epoch:
    gammas = Gammas(
        {"a.weight": torch.full((4,), 0.5), "b.weight": torch.zeros(6)}, 0.25, 1e-3, 1.2
    )
    return Epoch(
        "sparsity training", index, 9, index, loss, 90.0 + index, 0.1, 2.0, 512.0,
        gammas if with_gammas else None,
    )  # fmt: skip


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_reads_scalars_and_histograms_of_each_layer(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.epoch_finished(epoch(1))
    log.epoch_finished(epoch(2, with_gammas=False))
    log.close()
    events = read(tmp_path)
    last = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    assert {tag: (event.step, round(event.value, 6)) for tag, event in last.items()} == {
        "loss/train": (2, 0.5),
        "accuracy/test": (2, 92.0),
        "learning_rate": (2, 0.1),
        "images_per_second": (2, 512.0),
        "pruning/macs_cut": (1, 0.25),
        "pruning/gamma_at_zero": (1, 0.6),
        "pruning/lam": (1, 0.001),
        "pruning/t": (1, 1.2),
    }
    counts = {
        tag: events.Histograms(tag)[0].histogram_value.num for tag in events.Tags()["histograms"]
    }
    assert counts == {"gamma": 10, "gamma_of/a.weight": 4, "gamma_of/b.weight": 6}


def test_tensorboard_hides_what_an_interruption_undid(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    for index in (1, 2, 3):
        log.epoch_finished(epoch(index, loss=1.0))
    log.close()
    time.sleep(1.1)  # event files are read in the order of their names, which hold the second
    log = TensorBoardLog(tmp_path, done=1)
    log.epoch_finished(epoch(2, loss=0.25))
    log.close()
    seen = [(event.step, event.value) for event in read(tmp_path).Scalars("loss/train")]
    assert seen == [(1, 1.0), (2, 0.25)]


def strict(line: str) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)


def test_json_log_goes_on_after_its_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLog(path, [])
    for index in (1, 2, 3):
        log.epoch_finished(epoch(index))
    log.close()
    history = [epoch(1).to_dict()]
    log = JsonLog(path, history)
    log.epoch_finished(epoch(2, loss=0.125))
    log.close()
    lines = [unsealed(strict(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [epoch(1).to_dict(), epoch(2, loss=0.125).to_dict()]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_json_log_of_a_diverged_run_is_still_json(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLog(path, [])
    log.epoch_finished(epoch(1, loss=loss))
    log.close()
    values = strict(path.read_text(encoding="utf-8"))
    assert values["loss"] is None and values["accuracy"] == 91.0
