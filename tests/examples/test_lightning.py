"""The Lightning example: γ move as the formula says, whatever the trainer does around the step."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.trainers import (
    LAM,
    LR,
    STEPS,
    T,
    assert_pruned_alike,
    digits,
    example,
    factors,
    loader,
    near_the_ends,
    plain_loop,
    tolerance,
)
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD

import polarfast as pf

pytestmark = pytest.mark.slow


def lightning_trainer(folder: Path, **arguments: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytest.importorskip("lightning").Trainer
    arguments = {"max_epochs": 1, "enable_checkpointing": False, **arguments}
    return trainer(accelerator="cpu", default_root_dir=folder, **quiet, **arguments)


def lightning_module(example: ModuleType) -> Any:
    torch.manual_seed(0)
    module = example.Digits(lr=LR)
    near_the_ends(module.scales)
    return module


def lightning_oracle(example: ModuleType, batches: Any, **how: Any) -> Tensor:
    module = lightning_module(example)
    optimizer = SGD(module.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    return plain_loop(module.net, optimizer, module.scales, batches, **how)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_follows_the_formula(tmp_path: Path, precision: str, accumulate: int) -> None:
    code, batches = example("lightning_module"), digits(STEPS * accumulate)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    how = {"accumulate": accumulate, "clip": 0.5, "dtype": dtype}
    expected = lightning_oracle(code, batches, **how)
    unpenalized = lightning_oracle(code, batches, lam=0.0, **how)

    module = lightning_module(code)
    trainer = lightning_trainer(
        tmp_path, precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=0.5
    )
    trainer.fit(module, loader(batches))
    assert trainer.global_step == STEPS
    assert_pruned_alike(factors(module.scales), expected, unpenalized, tolerance(dtype))


def test_lightning_does_what_the_step_does_in_a_plain_loop(tmp_path: Path) -> None:
    code, batches = example("lightning_module"), digits(STEPS)
    plain = lightning_module(code)
    optimizer = SGD(plain.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    scales, reg = plain.scales, pf.Polarization(LAM, T)
    expected = plain_loop(
        plain.net, optimizer, scales, batches, step=lambda: pf.step(optimizer, scales, reg)
    )
    module = lightning_module(code)
    lightning_trainer(tmp_path).fit(module, loader(batches))
    assert (factors(module.scales) - expected).abs().max() <= 1e-6


def test_lightning_with_a_scaler_that_skips_steps(tmp_path: Path) -> None:
    code, batches = example("lightning_module"), digits(STEPS + 2)
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    first = 2.0**19
    oracle_scaler, scaler = (GradScaler("cpu", init_scale=first) for _ in range(2))
    how = {"clip": 0.5, "dtype": torch.float16}
    expected = lightning_oracle(code, batches, scaler=oracle_scaler, **how)
    assert 1 < first / oracle_scaler.get_scale() <= 2**3, "some steps skipped, some not"
    unpenalized = lightning_oracle(
        code, batches, lam=0.0, scaler=GradScaler("cpu", init_scale=first), **how
    )

    module = lightning_module(code)
    precision = plugins.MixedPrecision("16-mixed", "cpu", scaler)
    trainer = lightning_trainer(tmp_path, plugins=[precision], gradient_clip_val=0.5)
    trainer.fit(module, loader(batches))
    assert scaler.get_scale() == oracle_scaler.get_scale()
    assert_pruned_alike(factors(module.scales), expected, unpenalized, tolerance(torch.float16))


def test_lightning_resumes_attached_once(tmp_path: Path) -> None:
    code, batches = example("lightning_module"), digits(STEPS)
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    kept = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = lightning_module(code)
    trainer = lightning_trainer(tmp_path, max_epochs=2, callbacks=[kept], enable_checkpointing=True)
    trainer.fit(straight, loader(batches))

    resumed = lightning_module(code)
    trainer = lightning_trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, loader(batches), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert trainer.global_step == 2 * STEPS
    assert torch.equal(factors(resumed.scales), factors(straight.scales))

    # The same without attaching anew: what is tested would show.
    bare = lightning_module(code)
    bare.configure_optimizers = lambda: SGD(
        bare.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4
    )
    trainer = lightning_trainer(tmp_path, max_epochs=2)
    trainer.fit(bare, loader(batches), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert (factors(bare.scales) - factors(straight.scales)).abs().max() > 1e-3


def test_lightning_wrapper_is_refused(tmp_path: Path) -> None:
    code = example("lightning_module")
    module = lightning_module(code)

    def step(batch: Any) -> None:
        pf.step(module.optimizers(), module.scales, pf.Polarization(LAM, T))

    module.training_step = step
    module.automatic_optimization = False
    with pytest.raises(pf.ArgumentError, match="LightningSGD.*pass the torch.optim.Optimizer"):
        lightning_trainer(tmp_path).fit(module, loader(digits(1)))
