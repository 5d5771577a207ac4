"""What the tests of the examples with other people's trainers share: few steps, an oracle.

The oracle is a loop written out here: torch's optimizer, float64 autograd of Eq. 2 added to γ.grad
after any unscaling and clipping, γ clamped after the step.
"""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import polarfast as pf
from support import oracles
from support.examples import EXAMPLES

FRAMEWORKS = {
    "lightning_module": "lightning",
    "timm_optimizer": "timm",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
}
LAM, T, LR = 4e-3, 1.2, 0.1
STEPS = 4


def example(name: str) -> ModuleType:
    pytest.importorskip(FRAMEWORKS[name])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(micro_batches: int) -> list[tuple[Tensor, Tensor]]:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target)
    return [(images[i * 16 :][:16], labels[i * 16 :][:16]) for i in range(micro_batches)]


def loader(batches: Sequence[tuple[Tensor, Tensor]]) -> DataLoader:
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def tolerance(dtype: torch.dtype | None) -> float:
    """In low precision the last bit of a γ can turn the rounding of what it scales."""
    return 1e-6 if dtype is None else 2e-5


def near_the_ends(scales: pf.ScalingFactors) -> None:
    """γ so near to 0 and 1 that the clamp has work to do within a few steps."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for gamma in scales.values():
            gamma.copy_(torch.rand(gamma.shape, generator=generator) * 0.002)
            gamma[::2] = 1 - gamma[::2]


def factors(scales: pf.ScalingFactors) -> Tensor:
    return torch.cat([gamma.detach().clone() for gamma in scales.values()])


def assert_pruned_alike(gammas: Tensor, oracle: Tensor, unpenalized: Tensor, tol: float) -> None:
    assert (gammas - oracle).abs().max() <= tol
    assert (gammas - unpenalized).abs().max() > 100 * tol, "the penalty would not show"
    assert (gammas == 0).any() and (gammas == 1).any(), "the clamp would not show"


def plain_loop(
    model: nn.Module,
    optimizer: Optimizer,
    scales: pf.ScalingFactors,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    lam: float = LAM,
    step: Callable[[], Any] | None = None,
) -> Tensor:
    """γ after a loop in which the formula is applied by hand; by `step` instead, if given."""
    gammas = list(scales.values())
    scaler = scaler or GradScaler("cpu", enabled=False)
    model.train()
    for i, (images, labels) in enumerate(batches, start=1):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss / accumulate).backward()
        if i % accumulate:
            continue
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if step is not None:
            step()
        else:
            penalties = oracles.subgradients(gammas, [1.0] * len(gammas), oracles.POLARIZATION, T)
            for gamma, penalty in zip(gammas, penalties, strict=True):
                gamma.grad += lam * penalty.float()
            scaler.step(optimizer)
            if lam:
                for gamma in gammas:
                    gamma.data.clamp_(0, 1)
        scaler.update()
        optimizer.zero_grad()
    return factors(scales)
