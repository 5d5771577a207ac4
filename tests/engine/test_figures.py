"""The figures are written, whole, and as large as print wants them."""

from pathlib import Path

import pytest
import torch

from polarfast.engine import figures


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.slow
def test_all_three(tmp_path: Path) -> None:
    scales = {"a.weight": torch.tensor([0.0, 0.0, 0.4]), "b.weight": torch.rand(500)}
    kept = {"a.weight": torch.tensor([2]), "b.weight": torch.arange(500)}
    thresholds = {"a.weight": 0.01, "b.weight": None}
    figures.gamma_histogram(tmp_path / "1.png", scales, kept, thresholds)
    histograms = [torch.histc(torch.rand(50), 100, 0, 1).int() for _ in range(30)]
    figures.gamma_over_epochs(tmp_path / "2.png", histograms)
    figures.channels_kept(
        tmp_path / "3.png", {"a.weight": 1, "b.weight": 0}, {"a.weight": 3, "b.weight": 500}
    )
    for number in "123":
        width, height = png_size(tmp_path / f"{number}.png")
        assert width >= 1200 and height >= 600


@pytest.mark.slow
def test_one_epoch_and_no_threshold(tmp_path: Path) -> None:
    figures.gamma_over_epochs(tmp_path / "e.png", [torch.ones(100)])
    scales, kept = {"a": torch.full((4,), 0.5)}, {"a": torch.arange(4)}
    figures.gamma_histogram(tmp_path / "h.png", scales, kept, {"a": None})
    assert png_size(tmp_path / "e.png") and png_size(tmp_path / "h.png")
