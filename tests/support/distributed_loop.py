"""One small training loop that the distributed tests spread over processes in every way."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

import polarfast as pf

SHARDS, STEPS = 6, 3  # shards of a batch: one, two or three for each process
WEIGHTS = {"1.weight": 0.5, "4.weight": 2.0}
REGULARIZERS: dict[str, Callable[[], pf.Regularizer]] = {
    "polarization": lambda: pf.Polarization(lam=0.02, t=1.2),
    "weighted": lambda: pf.Polarization(lam=0.02, t=1.2, weights=WEIGHTS),
    "layer": lambda: pf.Polarization(lam=0.02, t=1.2, mean="layer", weights=WEIGHTS),
    "l1": lambda: pf.L1(lam=0.02, weights=WEIGHTS),
    "deephoyer": lambda: pf.DeepHoyer(lam=0.02, weights=WEIGHTS),
}


def network() -> nn.Sequential:
    """γ of 16, 2 and 5 channels: three processes hold 6, 6, 4; 1, 1, 0; and 2, 2, 1 of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU()),
        *(nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
    )
    for i in (1, 4, 7):
        nn.init.uniform_(model[i].weight, 0.02, 0.98)
    return model


def example() -> Tensor:
    return torch.randn(1, 1, 10, 10, generator=torch.Generator().manual_seed(1))


def batch(step: int, shard: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + shard)
    images = torch.randn(4, 1, 10, 10, generator=generator)
    return images, torch.randint(3, (4,), generator=generator)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "fused": lambda p: AdamW(p, lr=0.01, fused=True),
}


class Loop:
    """One training loop for every way of spreading it: this rank does its share of the shards."""

    def __init__(
        self,
        optimizer: str = "sgd",
        reg: str = "polarization",
        *,
        attach: bool = False,
        scaler: bool = False,
        clip: bool = False,
        shards: int = SHARDS,
        steps: int = STEPS,
    ) -> None:
        self.optimizer_name, self.reg = optimizer, REGULARIZERS[reg]()
        self.attach, self.clip, self.shards, self.steps = attach, clip, shards, steps
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=1024.0)

    def run(
        self,
        model: nn.Module,
        scales: pf.ScalingFactors,
        rank: int = 0,
        world: int = 1,
        no_sync: Callable[[bool], Any] = lambda last: nullcontext(),
    ) -> dict[str, Tensor]:
        optimizer = OPTIMIZERS[self.optimizer_name](model.parameters())
        if self.attach:
            pf.attach(optimizer, scales, self.reg)
        mine = range(rank, self.shards, world)
        for step in range(self.steps):
            optimizer.zero_grad()
            for shard in mine:
                images, labels = batch(step, shard)
                with no_sync(shard == mine[-1]):
                    loss = F.cross_entropy(model(images), labels) / len(mine)
                    self.scaler.scale(loss).backward()
            if self.clip:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if self.attach:
                self.scaler.step(optimizer)
            else:
                pf.step(optimizer, scales, self.reg, scaler=self.scaler)
            self.scaler.update()
        return whole(scales)


def whole(scales: pf.ScalingFactors) -> dict[str, Tensor]:
    """By torch's own gathering."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in scales.items()
    }


LOOPS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd-scaler-clip": {"scaler": True, "clip": True},
    "adamw-layer": {"optimizer": "adamw", "reg": "layer"},
    "adamw-attach-deephoyer": {"optimizer": "adamw", "attach": True, "reg": "deephoyer"},
    "fused-scaler-weighted": {"optimizer": "fused", "scaler": True, "reg": "weighted"},
    "sgd-4-shards": {"shards": 4},
    "fused-attach-scaler-l1": {"optimizer": "fused", "scaler": True, "attach": True, "reg": "l1"},
}


def single(name: str) -> dict[str, Tensor]:
    """One process that accumulates all shards."""
    model = network()
    return Loop(**LOOPS[name]).run(model, pf.scaling_factors(model, example()))


def target(how: str) -> tuple[nn.Module, pf.ScalingFactors, Loop]:
    """A network and a loop that steers to a share of MACs; how: "all" factors, or "some"."""
    model = network()
    scales = pf.scaling_factors(model, example())
    loop = Loop(steps=24, attach=how == "some")
    loop.reg = pf.FlopsTarget(model, example(), scales, 0.5, steps=30, every=4)
    return model, scales.select("^[17]") if how == "some" else scales, loop


def steered(scales: pf.ScalingFactors, loop: Loop, gammas: dict[str, Tensor]) -> dict[str, Any]:
    """What came of it."""
    assert isinstance(loop.reg, pf.FlopsTarget)
    return {
        "gammas": gammas,
        "state": loop.reg.state_dict(),
        "value": loop.reg.value(scales).detach(),
        "cut": loop.reg.predictor.cut(),
    }
