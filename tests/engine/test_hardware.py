"""Deterministic mode, and hardware that is not there or not fit for the recipe."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engine import TINY, on

from polarfast.engine import distributed, models
from polarfast.engine.distributed import Workers, deterministic
from polarfast.errors import ArgumentError


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_deterministic_mode_ends_with_the_block(before: tuple[bool, bool]) -> None:
    def flags() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with pytest.raises(ZeroDivisionError), deterministic(True):
            assert flags() == (True, False)
            raise ZeroDivisionError
        assert flags() == before
        with deterministic(False):
            assert flags() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArgumentError, match="--hardware.device cpu"):
        Workers(on(TINY, device="cuda").hardware)
    assert Workers(on(TINY, device="auto").hardware).device.type == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sync_batchnorm": True}, "GPUs only"),
        ({"precision": "fp16", "hardware": replace(TINY.hardware, parallel="fsdp")}, "use bf16"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    workers: Any = SimpleNamespace(device=torch.device("cpu"), distributed=True, world=2)
    with pytest.raises(ArgumentError, match=message):
        distributed.prepare(models.build("resnet8", 10, 1), replace(TINY, **changes), workers)


def test_sharded_only_under_torchrun() -> None:
    with pytest.raises(ArgumentError, match="torchrun"):
        Workers(on(TINY, parallel="fsdp").hardware)
