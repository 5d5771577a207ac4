"""A whole training step recorded once and replayed, against the same steps taken eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import polarfast as pf

from .real_loops import LAM, UPPER, NumericalError, T

Step = Callable[[], None]
#: Takes a step and a stream that it was warmed up on (None off the GPU); returns what replays it.
Recorder = Callable[[Step, "torch.cuda.Stream | None"], Step]


def on_internal_stream(step: Step, warmed: torch.cuda.Stream | None) -> Step:
    """A CUDA graph, recorded on the stream that torch keeps for this."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def on_warm_up_stream(step: Step, warmed: torch.cuda.Stream | None) -> Step:
    """A CUDA graph, recorded on the stream of the steps before it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=warmed):
        step()
    return graph.replay


class Trainee:
    """A network in training: model, scaling factors, optimizer, and one batch."""

    def __init__(
        self,
        model: nn.Module,
        scales: pf.ScalingFactors,
        optimizer: Optimizer,
        images: Tensor,
        labels: Tensor,
        set_to_none: bool,
    ) -> None:
        self.model, self.scales, self.optimizer = model, scales, optimizer
        self.images, self.labels, self.set_to_none = images, labels, set_to_none
        self.reg = pf.Polarization(LAM, T, upper=UPPER)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        F.cross_entropy(self.model(self.images), self.labels).backward()
        pf.step(self.optimizer, self.scales, self.reg)

    def twin(self, make: Callable[..., Optimizer]) -> Trainee:
        """The same training at the same point, in memory of its own."""
        model = copy.deepcopy(self.model)
        optimizer = make(model.parameters())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        scales = self.scales.rebind(model)
        return Trainee(model, scales, optimizer, self.images, self.labels, self.set_to_none)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimizer's state, by name."""
        found = dict(self.model.state_dict())
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state[param].items():
                if isinstance(value, Tensor):
                    found[f"{name}: {key}"] = value
        return found


def check_replays(
    record: Recorder,
    make: Callable[..., Optimizer],
    network: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    set_to_none: bool,
    replays: int = 10,
) -> None:
    """Warm up, record a step, look at thresholds, replay; then the same steps on an eager twin.

    Raises:
        NumericalError: a bit of a parameter, buffer or state differs.
    """
    torch.manual_seed(0)
    model = network().to(images.device)
    scales = pf.scaling_factors(model, images[:1], residual="expand")
    pf.init_scales(scales, 0.5)
    trainee = Trainee(model, scales, make(model.parameters()), images, labels, set_to_none)
    with _deterministic():
        warmed = _warm_up(trainee.step, images.device)
        eager = trainee.twin(make)
        replay = record(trainee.step, warmed)
        pf.thresholds(trainee.scales)  # reads and may move the table that the graph reads
        for _ in range(replays):
            replay()
            eager.step()
    got, expected = trainee.tensors(), eager.tensors()
    assert got.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(got[name], expected[name])]
    if wrong:
        shown = ", ".join(wrong[:3])
        raise NumericalError(f"{len(wrong)} of {len(expected)} tensors differ, {shown} among them")


def _warm_up(step: Step, device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        for _ in range(3):
            step()
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return stream


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same convolution kernels in every step. (Matrix products are, where the variable
    CUBLAS_WORKSPACE_CONFIG is set, or there are none.)
    """
    flags = torch.backends.cudnn
    before = flags.deterministic, flags.benchmark
    flags.deterministic, flags.benchmark = True, False
    try:
        yield
    finally:
        flags.deterministic, flags.benchmark = before
