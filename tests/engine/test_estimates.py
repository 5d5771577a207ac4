"""The numbers of a dry run, against arithmetic and what autograd's graph holds."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from support.engine import TINY, on
from torch import nn

from polarfast.engine import models
from polarfast.engine.data.source import load
from polarfast.engine.estimates import dry_run, estimate
from polarfast.engine.recipe import Pruning, Recipe
from polarfast.errors import PolarfastError

DATA = load(TINY.data, torch.device("cpu"))
FLOAT = 4  # bytes


def test_steps_and_state() -> None:
    model = models.build("resnet8", 10, 1)
    params = sum(param.numel() for param in model.parameters())
    cost = estimate(model, DATA, TINY)
    assert cost.params == params
    assert cost.state_bytes == 3 * FLOAT * params  # weights, gradients, momentum
    assert cost.images_per_second > 0
    hours = 5 * 100 / cost.images_per_second / 3600
    assert cost.hours(TINY, DATA) == pytest.approx(hours)
    others: dict[int, Recipe] = {
        4: replace(TINY, ema=0.9),
        2: replace(TINY, momentum=0.0),
        3: replace(TINY, momentum=0.0, ema=0.9),
    }
    for copies, recipe in others.items():
        assert estimate(model, DATA, recipe).state_bytes == copies * FLOAT * params
    sharded = estimate(model, DATA, on(TINY, parallel="fsdp"), world=2)
    assert sharded.state_bytes == 3 * FLOAT * params // 2


class Chain(nn.Module):
    """Of which one can say by hand what the backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(24, 1, 1), (24, 2, 1), (24, 2, 3)])
def test_activations_by_hand(batch: int, accumulate: int, world: int) -> None:
    recipe = replace(TINY, batch_size=batch, accumulate=accumulate)
    images = batch // accumulate // world
    plane = 16 * 16
    # The image for conv, conv's output for the norm, relu's output (once, for relu and fc), and
    # log-probabilities; the norm's saved statistics and the labels are small change.
    expected = FLOAT * images * (plane + 8 * plane + 8 * plane + 10)
    found = estimate(Chain(), DATA, recipe, world).activation_bytes
    assert expected <= found <= expected + 1024 + 24 * images


def test_activations_are_what_the_allocator_holds() -> None:
    """Beside torch's profiler: bytes that the forward pass allocates and leaves."""
    recipe = replace(TINY, batch_size=16)
    torch.manual_seed(0)
    model = models.build("resnet8", 10, 1)
    images, labels = DATA.example(16), torch.zeros(16, dtype=torch.int64)
    F.cross_entropy(model(images), labels).backward()
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = F.cross_entropy(model(images), labels)
    held = sum(event.self_cpu_memory_usage for event in profiler.events())
    loss.backward()
    found = estimate(model, DATA, recipe).activation_bytes
    own = FLOAT * images.numel()  # the images were there before
    assert found - own == pytest.approx(held, rel=0.05)


def test_half_precision_keeps_less() -> None:
    model = models.build("resnet8", 10, 1)
    full = estimate(model, DATA, TINY).activation_bytes
    half = estimate(model, DATA, replace(TINY, precision="bf16")).activation_bytes
    assert 0.4 < half / full < 0.9


def test_dry_run_tells_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    screen = io.StringIO()
    dry_run(TINY, Console(width=120, file=screen))
    text = screen.getvalue()
    assert "3 x 4 = 12" in text and "2 x 4 = 8" in text
    assert "model: resnet8" in text and "layer3.0.bn2.weight" in text
    params = sum(p.numel() for p in models.build("resnet8", 10, 1).parameters())
    assert f"{params:,} parameters" in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_would() -> None:
    keep = replace(TINY.sparsity, residual="keep")
    pruning = Pruning(method="percentile", cut=0.999)
    for recipe, message in (
        (replace(TINY, batch_size=101), "batch_size=101"),
        (replace(TINY, model="resnet21"), "'resnet21'"),
        (replace(TINY, sparsity=keep, pruning=pruning), "cut=0.999 of the MACs is out of reach"),
    ):
        with pytest.raises(PolarfastError, match=message):
            dry_run(recipe, Console(quiet=True))
