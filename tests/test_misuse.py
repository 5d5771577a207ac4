"""What goes wrong in the first hour: arguments that change places, and models that hold something
that cannot be worked with. Each is an error of ours that says what to do.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import polarfast as pf

X = torch.randn(2, 3, 8, 8)


def network(act: nn.Module | None = None, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), act or nn.ReLU(),
        nn.Conv2d(width, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def slimmed(model: nn.Module) -> nn.Module:
    scales = pf.scaling_factors(model, X)
    with torch.no_grad():
        for gamma in scales.values():
            gamma[::2] = 0
    return pf.slim(model, pf.plan(model, X, scales, "fixed", value=0.0))


LABELS = torch.tensor([1, 0])


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


NO_INPUTS: dict[str, tuple[Any, str]] = {
    "named tuple": ((Pair(X, LABELS),), "a Pair, a named tuple, .*let the network take its fields"),
    "loader": (DataLoader(TensorDataset(X, LABELS)), r"a DataLoader: .*of next\(iter\(loader"),
    "data set": (TensorDataset(X, LABELS), r"a TensorDataset: .*of next\(iter\(loader"),
    "array": (X.numpy(), "a ndarray: .*as torch.as_tensor"),
    "batch": ((X, LABELS), "takes 2 positional arguments but 3 .*without labels"),
    "batch as a list": ([X, LABELS], r"example_inputs\[1\] has other inputs.* labels are none"),
    "model": (network(), "a Sequential: pass a tensor"),
}


@pytest.mark.parametrize("name", NO_INPUTS)
def test_what_is_no_example_input(name: str) -> None:
    given, message = NO_INPUTS[name]
    with pytest.raises(pf.PolarfastError, match=message):
        pf.scaling_factors(network(), given)


MISPLACED: dict[str, tuple[Callable[..., Any], str]] = {
    "plan": (lambda m, s, r, o: pf.plan(m, s, X), "pf.plan.*Tensor as scales"),
    "reachable": (lambda m, s, r, o: pf.reachable(m, s, X), "pf.reachable.*Tensor as scales"),
    "predictor": (lambda m, s, r, o: pf.CutPredictor(m, s, X), "pf.CutPredictor.*Tensor"),
    "target": (lambda m, s, r, o: pf.FlopsTarget(m, s, X), "pf.FlopsTarget.*Tensor as scales"),
    "step": (lambda m, s, r, o: pf.step(o, r, s), "a Polarization as scales"),
    "attach": (lambda m, s, r, o: pf.attach(o, r, s), "a Polarization as scales"),
    "slim": (lambda m, s, r, o: pf.slim(m, s), "a Sequential and a ScalingFactors"),
    "slim of a plan": (lambda m, s, r, o: pf.slim(pf.plan(m, X, s), m), "a PruningPlan and a Seq"),
    "init": (lambda m, s, r, o: pf.init_scales(m, 0.5), "given a Sequential as scales"),
    "init by scales": (lambda m, s, r, o: pf.init_scales(0.5, s), "given a float as scales"),
    "a dict": (
        lambda m, s, r, o: pf.plan(m, X, s, cut=0.3, of="latency", latency={"a": 1}),
        "latency is a dict: pass a pf.LatencyTable",
    ),
    "a dtype": (
        lambda m, s, r, o: pf.LatencyTable.measure(m, X, dtype="float16"),
        "give a torch.dtype",
    ),
    "a batch": (lambda m, s, r, o: pf.recalibrate(m, X), r"pass a loader, or \[batch\]"),
    "a path": (
        lambda m, s, r, o: pf.plan(m, X, s, cut=0.3, of="latency", latency="t.json"),
        "pf.LatencyTable.load",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MISPLACED)
def test_arguments_that_change_places(name: str) -> None:
    call, message = MISPLACED[name]
    model = network()
    scales, reg = pf.scaling_factors(model, X), pf.Polarization(1e-4, 1.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(pf.ArgumentError, match=message):
        call(model, scales, reg, optimizer)


def test_what_cannot_be_copied_is_named() -> None:
    model = network()
    model[2].lock = threading.Lock()
    with pytest.raises(pf.PlanError, match=r"^2\.lock is a lock"):
        slimmed(model)


def by_hook() -> nn.Module:
    model = network()
    extra = nn.Conv2d(8, 8, 1)
    model[1].register_forward_hook(lambda module, args, out: out + extra(out))
    return model


def by_attribute() -> nn.Module:
    model = network(Called())
    norm = model[4]
    model[2].function = lambda x: norm(x)
    return model


def in_a_list() -> nn.Module:
    model = network(Called())
    model[2].layers = [nn.Conv2d(8, 8, 1)]
    model[2].function = lambda x: x  # harmless
    return model


class Called(nn.Module):
    function: Callable[[Tensor], Tensor]
    layers: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.function(x)


FUNCTION = r"holds a function \(<lambda>\) that uses layers of where it was made"
LEFT_BEHIND = {
    by_hook: rf"1\._forward_hooks {FUNCTION}.*make it a method",
    by_attribute: rf"2\.function {FUNCTION}",
    in_a_list: r"2\.layers holds a Conv2d that is not registered.*use nn\.ModuleList",
}


@pytest.mark.parametrize("build", LEFT_BEHIND, ids=lambda build: build.__name__)
def test_layers_that_copies_do_not_take_along(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(pf.PlanError, match=LEFT_BEHIND[build]):
        slimmed(build())


def test_lazy_layers_are_named() -> None:
    with pytest.raises(pf.TracingError, match=r"3\.weight has no size yet \(a lazy layer\)"):
        pf.scaling_factors(nn.Sequential(*network()[:3], nn.LazyConv2d(8, 3)), X)


class Particular(nn.Module):
    """Takes float32 alone."""

    def __init__(self, by_assertion: bool) -> None:
        super().__init__()
        self.net, self.by_assertion = network(), by_assertion

    def forward(self, x: Tensor) -> Tensor:
        if self.by_assertion:
            assert x.dtype == torch.float32
        elif x.dtype != torch.float32:
            raise TypeError("images must be float32")
        return self.net(x)


@pytest.mark.parametrize("by_assertion", [False, True])
def test_networks_that_check_their_dtype(by_assertion: bool) -> None:
    why = "assert" if by_assertion else "images must be float32"
    with pytest.raises(pf.PlanError, match=f"cannot run in float64.*{why}"):
        slimmed(Particular(by_assertion))


@pytest.mark.filterwarnings("ignore")
def test_scripted_parts() -> None:
    slim = slimmed(network(torch.jit.script(nn.Hardswish())))
    assert slim[0].out_channels < 8


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    model = network()
    plan = pf.plan(model, X, pf.scaling_factors(model, X), cut=0.3)
    with pytest.raises(pf.ArgumentError, match="no folder"):
        pf.save(pf.slim(model, plan), plan, tmp_path / "none" / "slim.pt")
    assert not (tmp_path / "none").exists()


def test_a_latency_table_is_of_one_network() -> None:
    model, x = network(), torch.rand(1, 3, 32, 32)
    wider = nn.Sequential(*network()[:6], *network()[3:6], *network()[3:])
    table = pf.LatencyTable.measure(model, x, seconds=0.2, error=0.5, progress=False)
    for other, fits in ((network(), True), (wider, False)):
        scales = pf.scaling_factors(other, x)
        if fits:
            assert pf.reachable(other, x, scales, latency=table)
            continue
        with pytest.raises(pf.PlanError, match="the latency table is of another network"):
            pf.reachable(other, x, scales, latency=table)
    with pytest.raises(pf.ArgumentError, match="given a Sequential: pass what pf.plan returned"):
        table.latency(model)


def test_constructors_of_other_networks(tmp_path: Path) -> None:
    model = network()
    scales = pf.scaling_factors(model, X)
    with torch.no_grad():
        next(iter(scales.values()))[:2] = 0
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    pf.save(pf.slim(model, plan), plan, tmp_path / "slim.pt")
    with pytest.raises(pf.PlanError, match=r"'0.out_channels' cannot be 6 in a Conv2d: it is 4"):
        pf.load(tmp_path / "slim.pt", lambda: network(width=4))
    with pytest.raises(pf.PlanError) as error:
        pf.load(tmp_path / "slim.pt", lambda: nn.Sequential(nn.Sequential(*network()[:2])))
    assert "give that, the network itself" not in str(error.value)
