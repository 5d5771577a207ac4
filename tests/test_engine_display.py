"""What is shown while a run goes on."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from polarfast.engine.display import (
    LiveDisplay,
    LogDisplay,
    log_line,
    make_display,
    sparkline,
)
from polarfast.engine.events import Epoch, Gammas

EPOCH = Epoch(
    stage="sparsity training",
    epoch=3,
    epochs=12,
    index=3,
    loss=0.51234,
    accuracy=97.5,
    lr=0.1,
    seconds=0.62,
    gammas=Gammas(torch.tensor([0.0, 0.001, 0.5, 0.55]), cut=0.412),
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
    gammas = EPOCH.gammas
    assert gammas is not None and gammas.at_zero == 0.5
    assert gammas.histogram.nonzero().flatten().tolist() == [0, 50, 55]
    assert EPOCH.to_dict()["at_zero"] == 0.5 and EPOCH.to_dict()["cut"] == 0.412
    assert "cut" not in replace(EPOCH, gammas=None).to_dict()


def test_log_line_holds_all_figures() -> None:
    line = log_line(EPOCH)
    for part in ("3/12", "0.5123", "97.50 %", "41.2 %", "50 % at 0", "0.6 s"):
        assert part in line
    assert "\n" not in line


def test_log_shows_first_and_last_epoch_and_notes() -> None:
    out = console(terminal=False)
    display = make_display(out)
    assert isinstance(display, LogDisplay)
    display.stage_started("sparsity training", 0, 12)
    for number in range(1, 13):
        display.epoch_finished(replace(EPOCH, epoch=number))
    display.note("[done] 50 %")
    display.close()
    lines = text(out).splitlines()
    assert lines[0].startswith("sparsity training  1/12")
    assert lines[1].startswith("sparsity training 12/12")
    assert lines[2:] == ["[done] 50 %"]
    assert "\x1b" not in text(out)


@pytest.mark.parametrize("gammas", [EPOCH.gammas, None])
def test_live_display_draws_and_leaves(gammas: Gammas | None) -> None:
    out = console(terminal=True)
    display = make_display(out)
    assert isinstance(display, LiveDisplay)
    display.stage_started("sparsity training", 2, 12)
    display.epoch_finished(replace(EPOCH, gammas=gammas))
    display._live.refresh()
    display.note("a note")
    display.close()
    shown = text(out)
    assert "epoch 3/12" in shown and "97.50 %" in shown and "a note" in shown
    assert ("41.2 %" in shown) == (gammas is not None)
