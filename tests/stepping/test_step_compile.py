"""torch.compile: compiled models train, and a step inside a compiled function runs eagerly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stepping import assert_same
from torch import Tensor, nn
from torch.optim import SGD

from polarfast.scaling.factors import ScalingFactors
from polarfast.stepping.regularizers import Polarization
from polarfast.stepping.step import attach, step

REG = Polarization(0.05, 1.2)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Case:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        nn.init.constant_(self.net[1].weight, 0.5)  # type: ignore[arg-type]
        gamma: Any = self.net[1].weight
        self.scales = ScalingFactors({"1.weight": gamma})
        self.optimizer = SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def train(
        self,
        forward: Callable[[Tensor], Tensor] | None = None,
        update: Callable[[], Any] | None = None,
    ) -> list[Tensor]:
        forward = forward or self.net
        for _ in range(4):
            self.optimizer.zero_grad()
            forward(torch.randn(8, 4)).square().mean().backward()
            update() if update else step(self.optimizer, self.scales, REG)
        return list(self.net.parameters())


@pytest.mark.slow
def test_a_compiled_model_trains() -> None:
    case = Case()
    compiled: Any = torch.compile(case.net, backend="aot_eager")
    assert_same(case.train(compiled), Case().train(), 1e-6)


def test_a_step_inside_a_compiled_function_breaks_the_graph() -> None:
    case = Case()

    @torch.compile(backend="eager")
    def update(x: Tensor) -> Tensor:
        y = x * 2
        step(case.optimizer, case.scales, REG)
        return y + 1

    def check() -> None:
        assert torch.equal(update(torch.ones(2)), torch.full((2,), 3.0))

    assert_same(case.train(update=check), Case().train(), 1e-7)


def test_a_whole_compiled_training_step() -> None:
    case = Case()

    @torch.compile(backend="eager")
    def train_step(x: Tensor) -> None:
        case.net(x).square().mean().backward()
        step(case.optimizer, case.scales, REG)

    for _ in range(4):
        case.optimizer.zero_grad()
        train_step(torch.randn(8, 4))
    assert_same(list(case.net.parameters()), Case().train(), 1e-6)


def test_a_compiled_step_of_an_attached_optimizer() -> None:
    case = Case()
    attach(case.optimizer, case.scales, REG)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    update = torch.compile(lambda: case.optimizer.step(), backend=backend)
    assert_same(case.train(update=update), Case().train(), 1e-6)
    assert graphs, "what the optimizer itself does is compiled"


def test_fullgraph_says_that_it_cannot() -> None:
    case = Case()
    case.train()
    update = torch.compile(
        lambda: step(case.optimizer, case.scales, REG), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported):
        update()
