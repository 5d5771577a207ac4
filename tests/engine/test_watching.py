"""What is shown while a run goes on."""

import io
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from polarfast.engine import watching as module
from polarfast.engine.histograms import Gammas
from polarfast.engine.watching import (
    Epoch,
    LiveDisplay,
    LogDisplay,
    Step,
    log_line,
    make_display,
    sparkline,
    step_line,
)

GAMMAS = Gammas(
    {"a.weight": torch.tensor([0.0, 0.001]), "b.weight": torch.tensor([0.5, 0.55])},
    cut=0.412,
    lam=2e-3,
    t=1.2,
)
EPOCH = Epoch(
    stage="sparsity training",
    epoch=3,
    epochs=12,
    index=3,
    loss=0.51234,
    accuracy=97.5,
    lr=0.1,
    seconds=0.62,
    images_per_second=2345.6,
    gammas=GAMMAS,
)
STEP = Step(
    stage="sparsity training",
    step=350,
    steps=1200,
    epoch=4,
    epochs=12,
    loss=0.25,
    lr=0.05,
    images_per_second=1999.0,
    cut=0.437,
    at_zero=0.25,
)


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_sparkline_shows_every_cell_that_is_not_empty() -> None:
    counts = torch.zeros(100, dtype=torch.int32)
    counts[0], counts[42], counts[99] = 10_000, 1, 2500
    line = sparkline(counts, width=25)
    assert len(line) == 25
    assert line[0] == "█" and line[10] == "▁" and line[24] == "▄"
    assert line.replace(" ", "") == "█▁▄"


def test_sparkline_of_nothing_is_blank() -> None:
    assert sparkline(torch.zeros(100)).strip() == ""


def test_epoch_counts_what_is_near_zero() -> None:
    assert GAMMAS.at_zero == 0.5
    assert GAMMAS.histogram.nonzero().flatten().tolist() == [0, 50, 55]
    assert GAMMAS.histograms.shape == (2, 100)
    assert GAMMAS.histograms[0].nonzero().flatten().tolist() == [0]
    values = EPOCH.to_dict()
    assert (values["at_zero"], values["cut"], values["lam"], values["t"]) == (0.5, 0.412, 2e-3, 1.2)
    assert values["images_per_second"] == 2345.6 and values["epochs"] == 12
    assert not {"cut", "at_zero", "lam", "t"} & replace(EPOCH, gammas=None).to_dict().keys()


def test_histograms_are_numpys_and_lose_nothing() -> None:
    torch.manual_seed(0)
    layers = {str(i): torch.randn(37 * (i + 1)) for i in range(3)}  # negative ones and above 1
    gammas = Gammas(layers, 0.0, 0.0, 0.0)
    for row, values in zip(gammas.histograms, layers.values(), strict=True):
        expected = np.histogram(np.minimum(np.abs(values.numpy()), 1.0), 100, (0.0, 1.0))[0]
        assert np.abs(row.numpy() - expected).sum() <= 2  # a value on the edge of a bin
        assert row.sum() == values.numel()
    assert torch.equal(gammas.histogram, gammas.histograms.sum(0))
    assert gammas.histogram.dtype == gammas.histograms.dtype == torch.int32


def test_log_line_holds_all_figures() -> None:
    line = log_line(EPOCH)
    for part in ("3/12", "0.5123", "97.50 %", "41.2 %", "50 % at 0", "2,346 img/s", "0.6 s"):
        assert part in line
    assert "λ 0.002" in line and "t 1.2" in line
    assert "\n" not in line


def test_step_line_holds_all_figures() -> None:
    line = step_line(STEP)
    for part in ("29.2 %", "epoch 4/12", "350 of 1,200", "0.2500", "43.7 %", "25 % of γ", "1,999"):
        assert part in line
    assert "MACs" not in step_line(replace(STEP, cut=None, at_zero=None))


def test_log_shows_first_and_last_epoch_and_notes() -> None:
    out = console(terminal=False)
    display = make_display(out)
    assert isinstance(display, LogDisplay)
    display.stage_started("sparsity training", 0, 1200, 12)
    for number in range(1, 13):
        display.epoch_finished(replace(EPOCH, epoch=number))
        display.step_finished(STEP)
    display.note("[done] 50 %")
    display.close()
    lines = text(out).splitlines()
    assert lines[0].startswith("sparsity training  1/12")
    assert lines[1].startswith("sparsity training 12/12")
    assert lines[2:] == ["[done] 50 %"]
    assert "\x1b" not in text(out)


def test_log_of_long_epochs_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = console(terminal=False)
    display = make_display(out)
    display.stage_started("sparsity training", 0, 1200, 12)
    for step in range(1, 301):
        now += 1.0
        display.step_finished(replace(STEP, step=step))
    lines = text(out).splitlines()
    assert [line.split("step ")[1].split(" of")[0] for line in lines] == [
        str(step) for step in range(60, 301, 60)
    ]


@pytest.mark.parametrize("gammas", [GAMMAS, None])
def test_live_display_draws_and_leaves(gammas: Gammas | None) -> None:
    out = console(terminal=True)
    display = make_display(out)
    assert isinstance(display, LiveDisplay)
    display.stage_started("sparsity training", 200, 1200, 12)
    display.epoch_finished(replace(EPOCH, gammas=gammas))
    display._live.refresh()
    display.note("a note")
    display.close()
    shown = text(out)
    assert "epoch 3/12" in shown and "97.50 %" in shown and "a note" in shown
    assert "2,346 img/s" in shown and "25%" in shown
    assert ("41.2 %" in shown) == (gammas is not None)


def test_live_display_moves_with_the_steps() -> None:
    out = console(terminal=True)
    display = LiveDisplay(out)
    display.stage_started("sparsity training", 0, 1200, 12)
    display.epoch_finished(EPOCH)
    for step in (320, 350):
        time.sleep(0.01)
        display.step_finished(replace(STEP, step=step))
    (task,) = display.progress.tasks
    assert task.completed == 350 and task.total == 1200 and task.time_remaining is not None
    display._live.refresh()
    display.close()
    shown = text(out)
    assert "epoch 4/12" in shown and "29%" in shown
    # The step's numbers beside what only an epoch has: accuracy, the picture of γ, λ and t.
    for part in ("0.2500", "1,999 img/s", "43.7 %", "25 %", "97.50 %", "(epoch 3)", "█", "0.002"):
        assert part in shown
