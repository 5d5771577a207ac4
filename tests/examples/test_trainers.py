"""Examples with other people's trainers prune; in Hugging Face's, γ move as the formula says."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

import polarfast as pf


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("lightning_module", {"precision": "32-true"}),  # in bfloat16 a CPU takes long
        ("timm_optimizer", {"name": "lamb"}),
        ("timm_optimizer", {"name": "lookahead_adamw"}),
        ("accelerate_loop", {}),
        ("hf_trainer", {}),
    ],
)
def test_the_example_prunes(
    name: str, arguments: dict[str, str], fresh_accelerator: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before, after, cut = example(name).main(epochs=6, **arguments)
    assert before > 0.9 and abs(after - before) < 0.02
    assert 0.15 < cut < 0.9


def accelerate_case(code: ModuleType) -> tuple[nn.Module, SGD, pf.ScalingFactors]:
    torch.manual_seed(0)
    model = code.resnet(8, in_channels=1)
    scales = pf.scaling_factors(model, torch.zeros(1, 1, 8, 8), residual="expand")
    near_the_ends(scales)
    return model, SGD(model.parameters(), lr=LR, momentum=0.9), scales


def constant(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_follows_the_formula(precision: str, fresh_accelerator: None) -> None:
    code, batches = example("accelerate_loop"), digits(2 * STEPS)
    dtype = torch.bfloat16 if precision == "bf16" else None
    how = {"accumulate": 2, "clip": 5.0, "dtype": dtype}
    expected = plain_loop(*accelerate_case(code), batches, **how)
    unpenalized = plain_loop(*accelerate_case(code), batches, lam=0.0, **how)

    accelerator = code.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model, optimizer, scales = accelerate_case(code)
    pf.attach(optimizer, scales, pf.Polarization(LAM, T))
    done: list[int] = []
    optimizer.register_step_post_hook(lambda *_: done.append(1))
    prepared = accelerator.prepare(model, optimizer, constant(optimizer), loader(batches))
    code.train(accelerator, *prepared, epochs=1)
    assert len(done) == STEPS
    assert_pruned_alike(factors(scales), expected, unpenalized, tolerance(dtype))


def test_accelerate_restores_a_state_with_what_is_attached(
    tmp_path: Path, fresh_accelerator: None
) -> None:
    code, batches = example("accelerate_loop"), digits(STEPS)
    accelerator = code.Accelerator(cpu=True)
    model, optimizer, scales = accelerate_case(code)
    pf.attach(optimizer, scales, pf.Polarization(LAM, T))
    prepared = accelerator.prepare(model, optimizer, constant(optimizer), loader(batches))
    code.train(accelerator, *prepared, epochs=1)
    accelerator.save_state(str(tmp_path))
    code.train(accelerator, *prepared, epochs=1)
    straight = factors(scales)
    accelerator.load_state(str(tmp_path))
    assert not torch.equal(factors(scales), straight)
    code.train(accelerator, *prepared, epochs=1)
    assert torch.equal(factors(scales), straight)


@pytest.mark.slow
def test_accelerate_with_a_scaler_that_skips_steps(fresh_accelerator: None) -> None:
    """Accelerate takes float16 on a GPU only; its optimizer takes a scaler anywhere."""
    code, batches = example("accelerate_loop"), digits(STEPS + 2)
    wrapper = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer
    code.Accelerator(cpu=True)
    first, dtype = 2.0**19, torch.float16
    oracle_scaler, scaler, third = (GradScaler("cpu", init_scale=first) for _ in range(3))
    expected = plain_loop(*accelerate_case(code), batches, dtype=dtype, scaler=oracle_scaler)
    unpenalized = plain_loop(*accelerate_case(code), batches, dtype=dtype, scaler=third, lam=0.0)
    assert 1 < first / oracle_scaler.get_scale() <= 2**3, "some steps skipped, some not"

    model, optimizer, scales = accelerate_case(code)
    pf.attach(optimizer, scales, pf.Polarization(LAM, T))
    wrapped = wrapper(optimizer, scaler=scaler)
    skipped = 0
    for images, labels in batches:
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        before = factors(scales)
        wrapped.step()
        assert wrapped.step_was_skipped == torch.equal(before, factors(scales))
        skipped += wrapped.step_was_skipped
        wrapped.zero_grad()
    assert skipped >= 1 and scaler.get_scale() == oracle_scaler.get_scale()
    assert_pruned_alike(factors(scales), expected, unpenalized, tolerance(dtype))


def test_accelerate_wrapper_is_refused(fresh_accelerator: None) -> None:
    code = example("accelerate_loop")
    _, optimizer, scales = accelerate_case(code)
    prepared = code.Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(pf.ArgumentError, match="AcceleratedOptimizer.*pass the torch.optim"):
        pf.attach(prepared, scales, pf.Polarization(LAM, T))
    pf.attach(prepared.optimizer, scales, pf.Polarization(LAM, T))


def test_accelerate_with_a_scaler_takes_the_step_that_it_finds(fresh_accelerator: None) -> None:
    code, reg = example("accelerate_loop"), pf.Polarization(LAM, T)
    wrapper = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer
    code.Accelerator(cpu=True)
    for first in ("attach", "wrap"):
        _, optimizer, scales = accelerate_case(code)
        if first == "attach":
            pf.attach(optimizer, scales, reg)
        scaler = GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        wrapped = wrapper(optimizer, scaler=scaler)
        if first == "wrap":
            pf.attach(optimizer, scales, reg)
        for gamma in scales.values():
            gamma.grad = torch.zeros_like(gamma)
        before = factors(scales)
        if first == "wrap":
            with pytest.raises(pf.StepError, match=r"accelerator\.prepare does"):
                wrapped.step()
        else:
            wrapped.step()
        assert torch.equal(before, factors(scales)) == (first == "wrap")


def hf_trainer(code: ModuleType, folder: Path, epochs: int, attach: bool = True) -> Any:
    """A trainer at a constant learning rate on 64 images in a fixed order, saving each epoch."""
    torch.manual_seed(0)
    model, data = code.Network(), code.Digits(0, 16 * STEPS)
    scales = pf.scaling_factors(model, data.images[:1], residual="expand")
    near_the_ends(scales)
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9)
    if attach:
        pf.attach(optimizer, scales, pf.Polarization(LAM, T))
    arguments = code.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, max_grad_norm=0.5,
        gradient_accumulation_steps=2, save_strategy="epoch", report_to="none", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip

    class InOrder(code.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=8))

    trainer = InOrder(
        model, arguments, train_dataset=data, optimizers=(optimizer, constant(optimizer))
    )
    return trainer, scales


@pytest.mark.slow
def test_hf_trainer_follows_the_formula_and_resumes(
    tmp_path: Path, fresh_accelerator: None
) -> None:
    code = example("hf_trainer")
    trainer, scales = hf_trainer(code, tmp_path, epochs=2)
    trainer.train()
    assert trainer.state.global_step == 2 * STEPS
    by_hand: list[Tensor] = []
    for lam in (LAM, 0.0):
        plain, same = hf_trainer(code, tmp_path / "plain", epochs=2, attach=False)
        data = plain.train_dataset
        batches = list(zip(data.images.split(8), data.labels.split(8), strict=True)) * 2
        how: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "lam": lam}
        net: Any = lambda images: plain.model(images)["logits"]  # noqa: E731, B023
        net.parameters, net.train = plain.model.parameters, plain.model.train
        by_hand.append(plain_loop(net, plain.optimizer, same, batches, **how))
    assert_pruned_alike(factors(scales), *by_hand, 1e-6)

    resumed, again = hf_trainer(code, tmp_path, epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert resumed.state.global_step == 2 * STEPS
    assert torch.equal(factors(again), factors(scales))
