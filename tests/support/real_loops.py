"""Training loops as people write them, each of their steps against Eq. 2 and the optimizer written
out in float64.

The gradients come from the loop itself: they are copied after each backward, together with the γ,
and the oracle says where the step must have left the γ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import polarfast as pf

from .kernel_internals import counted_uploads

# Strong enough for a missing term, a wrong sign or a missing clamp to stand out in one step.
LAM, T, UPPER = 1e-2, 1.2, 0.9
TOLERANCE = 2e-6  # of float32 γ of size one after one step
SETTLED = 3  # steps after which nothing is made, moved or recompiled any more
INFINITE_AT = 5  # the step whose gradients are spoilt where a GradScaler is used

SGD_OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
# Adam divides by the gradient's own size: with a small eps it would magnify the rounding of a
# gradient that cancels λ·∂R_s.
ADAMW_OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 1e-2}


class NumericalError(AssertionError):
    """A loop left γ where the oracle does not."""


# --- the oracle


def subgradients(gammas: Sequence[Tensor], lam: float, t: float) -> list[Tensor]:
    """λ·∂R_s/∂γ: Eq. 2 as printed, by autograd."""
    leaves = [gamma.clone().requires_grad_() for gamma in gammas]
    flat = torch.cat(leaves)
    penalty = lam * (t * flat.abs() - (flat - flat.mean()).abs()).sum()
    return list(torch.autograd.grad(penalty, leaves))


class WrittenOutSGD:
    """SGD with momentum and weight decay, on float64 tensors."""

    def __init__(self, lr: float, momentum: float, weight_decay: float) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocities: list[Tensor] = []

    def step(self, gammas: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        grads = [g + self.weight_decay * x for x, g in zip(gammas, grads, strict=True)]
        before = self.velocities or [torch.zeros_like(g) for g in grads]
        self.velocities = [self.momentum * v + g for v, g in zip(before, grads, strict=True)]
        return [x - self.lr * v for x, v in zip(gammas, self.velocities, strict=True)]


class WrittenOutAdamW:
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2), on float64 tensors."""

    def __init__(
        self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def step(self, gammas: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        b1, b2 = self.betas
        self.steps += 1
        first = self.first or [torch.zeros_like(g) for g in grads]
        second = self.second or [torch.zeros_like(g) for g in grads]
        self.first = [b1 * m + (1 - b1) * g for m, g in zip(first, grads, strict=True)]
        self.second = [b2 * v + (1 - b2) * g * g for v, g in zip(second, grads, strict=True)]
        moved = []
        for x, m, v in zip(gammas, self.first, self.second, strict=True):
            m, v = m / (1 - b1**self.steps), v / (1 - b2**self.steps)
            moved.append(x - self.lr * (m / (v.sqrt() + self.eps) + self.weight_decay * x))
        return moved


# --- the loops


def _data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _sharded(model: nn.Module, device: torch.device) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
    return model


def _compiled(mode: str) -> Callable[[nn.Module, torch.device], nn.Module]:
    return lambda model, device: torch.compile(model, mode=mode)


@dataclass(frozen=True)
class Loop:
    """How a loop is written.

    Attributes:
        optimizer: SGD or AdamW, with these further arguments.
        set_to_none: of `zero_grad`.
        scaler: mixed precision under a GradScaler, with infinite gradients in one step.
        wrap: what becomes of the network after its scaling factors are found.
        distributed: the wrapper needs a process group.
        unwaiting: what must not wait for the GPU once the loop has settled: the "loop", "pf.step"
            alone (where torch's own part may), or "nothing" (where torch's part of the step does).
        gpu_only: torch has it for GPUs alone, or it means nothing elsewhere.
    """

    optimizer: type[SGD] | type[AdamW] = SGD
    options: dict[str, Any] = field(default_factory=dict)
    set_to_none: bool = True
    scaler: bool = False
    side_stream: bool = False
    wrap: Callable[[nn.Module, torch.device], nn.Module] = lambda model, device: model
    distributed: bool = False
    unwaiting: str = "loop"
    gpu_only: bool = False


FUSED, FOREACH = {"fused": True}, {"foreach": True}
LOOPS: dict[str, Loop] = {
    "SGD fused": Loop(SGD, FUSED),
    "SGD foreach": Loop(SGD, FOREACH),
    "SGD fused, set_to_none=False": Loop(SGD, FUSED, set_to_none=False),
    "AdamW fused": Loop(AdamW, FUSED),
    "AdamW fused, set_to_none=False": Loop(AdamW, FUSED, set_to_none=False),
    "AdamW capturable": Loop(AdamW, {"capturable": True}, gpu_only=True),
    "GradScaler, SGD fused": Loop(SGD, FUSED, scaler=True),
    "GradScaler, SGD foreach": Loop(SGD, FOREACH, scaler=True, unwaiting="nothing"),
    "GradScaler, AdamW fused": Loop(AdamW, FUSED, scaler=True),
    "side stream": Loop(SGD, FUSED, side_stream=True, gpu_only=True),
    "DDP, gradient_as_bucket_view": Loop(
        SGD, FUSED, wrap=_data_parallel, distributed=True, unwaiting="pf.step"
    ),
    "FSDP2": Loop(SGD, FOREACH, wrap=_sharded, distributed=True, unwaiting="pf.step"),
    "torch.compile": Loop(
        SGD, FUSED, wrap=_compiled("default"), unwaiting="pf.step", gpu_only=True
    ),
    "torch.compile, reduce-overhead": Loop(
        SGD, FUSED, wrap=_compiled("reduce-overhead"), unwaiting="pf.step", gpu_only=True
    ),
}


@dataclass
class Followed:
    """What a loop did.

    Attributes:
        factors: the number of γ.
        largest_error: of a γ after a step, over all steps.
        skipped: steps that the GradScaler skipped.
        uploads: how often addresses went to the device, step by step.
    """

    factors: int = 0
    largest_error: float = 0.0
    skipped: int = 0
    uploads: list[int] = field(default_factory=list)


def follow(
    loop: Loop,
    network: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    steps: int = 20,
) -> Followed:
    """Run a loop on one batch, on the images' device, and hold each step to the oracle.

    Raises:
        NumericalError: a step left γ elsewhere, or a skipped step moved γ.
        RuntimeError: a settled step made the host wait for the GPU (torch's own message).
    """
    device = images.device
    stream = torch.cuda.Stream(device) if loop.side_stream else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with (
        _process_group(device) if loop.distributed else nullcontext(),
        torch.cuda.stream(stream),  # None: as it is
        counted_uploads() as uploads,
    ):
        return _Run(loop, network, images, labels).follow(steps, uploads)


class _Run:
    def __init__(
        self, loop: Loop, network: Callable[[], nn.Module], images: Tensor, labels: Tensor
    ) -> None:
        torch.manual_seed(0)
        self.loop, self.images, self.labels = loop, images, labels
        device = images.device
        plain = network().to(device)
        self.scales = pf.scaling_factors(plain, images[:1], residual="expand")
        with torch.no_grad():
            for gamma in self.scales.values():  # on both sides of the mean, and at both ends
                gamma.copy_(torch.rand_like(gamma))
                gamma.clamp_(0.02, UPPER - 0.02)
        self.model = loop.wrap(plain, device)
        self.scales = self.scales.rebind(self.model)
        adam = loop.optimizer is AdamW
        options = ADAMW_OPTIONS if adam else SGD_OPTIONS
        self.oracle = (WrittenOutAdamW if adam else WrittenOutSGD)(**options)
        self.optimizer = loop.optimizer(self.model.parameters(), **options, **loop.options)
        self.reg = pf.Polarization(LAM, T, upper=UPPER)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**10, growth_interval=10**6, enabled=loop.scaler
        )

    def follow(self, steps: int, uploads: list[int]) -> Followed:
        found = Followed(self.scales.numel())
        for number in range(steps):
            before, uploaded = self._gammas(), uploads[0]
            with self._unwaiting(number, "loop"):
                self._backward()
            if self.loop.scaler and number == INFINITE_AT:
                spoilt = next(p.grad for p in self.model.parameters() if p.grad is not None)
                spoilt.view(-1)[0] = torch.inf
            expected = self._expected(before, found)
            with self._unwaiting(number, "loop", "pf.step"):
                pf.step(self.optimizer, self.scales, self.reg, scaler=self.scaler)
                self.scaler.update()
            self._compare(number, expected, found)
            found.uploads.append(uploads[0] - uploaded)
        if self.loop.scaler and not found.skipped:
            raise NumericalError("no step was skipped, and one had infinite gradients")
        return found

    def _backward(self) -> None:
        if self.loop.side_stream:
            # What runs on another stream by mistake now comes long before this loop's own work.
            torch.cuda._sleep(10_000_000)
        self.optimizer.zero_grad(set_to_none=self.loop.set_to_none)
        device = self.images.device.type
        half = torch.float16 if device == "cuda" else torch.bfloat16
        with torch.autocast(device, half, enabled=self.loop.scaler):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.scaler.scale(loss).backward()

    def _gammas(self) -> list[Tensor]:
        return [_whole(gamma) for gamma in self.scales.values()]

    def _expected(self, before: list[Tensor], found: Followed) -> list[Tensor]:
        if self.loop.scaler and not self._all_finite():
            found.skipped += 1
            return before
        scale = self.scaler.get_scale()
        task = [_whole(gamma.grad) / scale for gamma in self.scales.values()]
        pushed = subgradients(before, LAM, T)
        moved = self.oracle.step(before, [g + s for g, s in zip(task, pushed, strict=True)])
        return [gamma.clamp(0, UPPER) for gamma in moved]

    def _all_finite(self) -> bool:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return bool(torch.stack([grad.isfinite().all() for grad in grads]).all())

    def _compare(self, number: int, expected: list[Tensor], found: Followed) -> None:
        for name, gamma, right in zip(self.scales, self._gammas(), expected, strict=True):
            error = float((gamma - right).abs().max())
            if not error <= TOLERANCE:  # NaN is none
                raise NumericalError(f"step {number}: {name} is {error:.2g} off")
            found.largest_error = max(found.largest_error, error)

    @contextmanager
    def _unwaiting(self, number: int, *parts: str) -> Iterator[None]:
        held = number >= SETTLED and self.loop.unwaiting in parts
        if not held or self.images.device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _whole(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU, of all processes' parts."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().double().clone()


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """One process, in a group of its own: no port, no launcher."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
