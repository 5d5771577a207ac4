"""What tests of the training step share: small factors, random gradients, a float64 oracle."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polarfast.scaling.factors import ScalingFactors

SIZES = (5, 16, 1, 33)


def make_scales(
    dtype: torch.dtype = torch.float32, seed: int = 0, sizes: Sequence[int] = SIZES
) -> ScalingFactors:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes)
    return ScalingFactors(
        {f"bn{i}.weight": nn.Parameter(v.to(dtype)) for i, v in enumerate(values)}
    )


def task_gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Random gradients for one step, the same for every copy of `params`."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        0.1 * torch.randn(param.shape, generator=generator, dtype=torch.float64) for param in params
    ]


def set_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    for param, grad in zip(params, task_gradients(params, step), strict=True):
        param.grad = (scale * grad).to(param.dtype)


def polarization(gammas: Sequence[Tensor], lam: float, t: float) -> Tensor:
    """Eq. 2 as printed."""
    flat = torch.cat([gamma.reshape(-1) for gamma in gammas])
    return lam * (t * flat.norm(1) - (flat - flat.mean()).norm(1))


def l1(gammas: Sequence[Tensor], lam: float, t: float) -> Tensor:
    return lam * sum((gamma.norm(1) for gamma in gammas), torch.zeros((), dtype=torch.float64))


class Oracle:
    """The plain way: float64 copies, autograd of the penalty, torch's optimizer, clamp."""

    def __init__(
        self,
        params: Sequence[Tensor],
        make_optimizer: Callable[[list[Tensor]], Optimizer],
        penalty: Callable[[Sequence[Tensor], float, float], Tensor] = polarization,
    ) -> None:
        self.params = [param.detach().double().clone().requires_grad_() for param in params]
        self.optimizer = make_optimizer(self.params)
        self._penalty = penalty

    def step(
        self,
        task: Sequence[Tensor],
        lam: float,
        t: float,
        upper: float | None = 1.0,
        of: Sequence[int] | None = None,
    ) -> None:
        """`of`: which parameters are scaling factors (all by default)."""
        gammas = [self.params[i] for i in (range(len(self.params)) if of is None else of)]
        maximize = self.optimizer.param_groups[0].get("maximize", False)
        self.optimizer.zero_grad()
        self._penalty(gammas, -lam if maximize else lam, t).backward()
        for param, grad in zip(self.params, task, strict=True):
            param.grad = grad.clone() if param.grad is None else param.grad + grad
        self.optimizer.step()
        if upper is not None:
            with torch.no_grad():
                for gamma in gammas:
                    gamma.clamp_(0.0, upper)


def assert_same(actual: Mapping[str, Tensor] | Sequence[Tensor], expected: Any, tol: float) -> None:
    left = list(actual.values()) if isinstance(actual, Mapping) else list(actual)
    right = list(expected.values()) if isinstance(expected, Mapping) else list(expected)
    for i, (a, e) in enumerate(zip(left, right, strict=True)):
        torch.testing.assert_close(
            a.detach().double(),
            e.detach().double(),
            rtol=0,
            atol=tol,
            msg=lambda m, i=i: f"{i}: {m}",
        )


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-2, torch.bfloat16: 0.2}[
        dtype
    ]
