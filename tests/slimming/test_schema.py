"""What a slim file says of modules is data: only what a slim model can be is taken from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import rezipped
from support.nets import Grouped, Residual, X, prepared
from torch import nn

import polarfast as pf

Info = dict[str, Any]


def build() -> nn.Module:
    return Residual().double().eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model, scales = prepared(Residual, "expand")
    plan = pf.plan(model, X, scales)
    pf.save(pf.slim(model, plan), plan, tmp_path / "slim.pt")
    return tmp_path / "slim.pt"


def change(path: Path, info: Callable[[Info], None] = lambda info: None, **tensors: Any) -> None:
    data = torch.load(path, weights_only=True)
    known = json.loads(data["info"])
    info(known)
    given = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    torch.save({**data, "info": json.dumps(known), "tensors": data["tensors"] | given}, path)


def attribute(module: str, name: str, value: Any) -> Callable[[Info], None]:
    return lambda info: info["structure"]["modules"][module]["attributes"].update({name: value})


def of_module(module: str, **fields: Any) -> Callable[[Info], None]:
    return lambda info: info["structure"]["modules"][module].update(fields)


def shape(name: str, *sizes: int) -> Callable[[Info], None]:
    return lambda info: info["structure"]["shapes"].update({name: list(sizes)})


def way_back(name: str, dim: str, pairs: Any) -> Callable[[Info], None]:
    return lambda info: info["origin"]["index"][name].update({dim: pairs})


CHANGES = {
    "forward": attribute("first.0", "forward", 1),
    "stride": attribute("first.0", "stride", 2),
    "eps": attribute("first.1", "eps", 7),
    "training": attribute("first.1", "training", 1),
    "private": attribute("first.0", "_parameters", 3),
    "of another kind of module": attribute("first.0", "num_features", 4),
    "text": attribute("first.0", "in_channels", "8"),
    "truth": attribute("first.0", "in_channels", True),
    "negative": attribute("first.0", "in_channels", -8),
    "more than there were": attribute("first.0", "in_channels", 800),
    "other groups": attribute("first.3", "groups", 0),
    "other than its weight": attribute("first.3", "out_channels", 3),
    "no features": attribute("first.1", "num_features", 3),
    "an unknown field": of_module("first.0", hooks=[1]),
    "another width": of_module("first.4", put_back=9),
    "no channels put back": of_module("first.4", put_back=None),
    "silent with channels": of_module("first.1", silent=True),
    "a silent convolution with channels": of_module("first.0", silent=True),
    "put back by a convolution": of_module("first.0", put_back=6),
    "a bias that is there": of_module("first.1", bias=True),
    "a silent container": lambda info: info["structure"]["modules"].update(
        {"first": {"attributes": {}, "put_back": None, "silent": True, "bias": False}}
    ),
    "a module that is not there": lambda info: info["structure"]["modules"].update(
        {"x": {"attributes": {}, "put_back": None, "silent": False, "bias": False}}
    ),
    "a tensor that is not there": shape("first.0.gate", 4),
    "another shape": shape("first.0.weight", 4, 8, 9),
    "a larger shape": shape("first.1.bias", 40),
    "no mapping": lambda info: info.update(structure=[1]),
    "an unknown fold": lambda info: info.update(fold="some"),
    "positions past the end": way_back("first.1.bias", "0", [[5, 8]]),
    "positions that repeat": way_back("first.1.bias", "0", [[0, 1], [0, 1]]),
    "positions that fall": way_back("first.1.bias", "0", [[4, 5], [0, 1]]),
    "positions of no dimension": way_back("first.1.bias", "7", [[0, 3]]),
    "positions in groups": way_back("first.1.bias", "0", [[[0, 3]], [[0, 3]]]),
    "positions of text": way_back("first.1.bias", "0", "0-3"),
    "a way back of other tensors": lambda info: info["origin"].update(ones=["stem.0.weight"]),
    "a constant that is not there": lambda info: info["origin"].update(
        put_back={"stem.1.bias": "x"}
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_no_slim_model_says_is_refused(path: Path, kind: str) -> None:
    change(path, CHANGES[kind])
    with pytest.raises((pf.FileFormatError, pf.PlanError), match=r"slim\.pt"):
        pf.load(path, build)


@pytest.mark.parametrize(
    "places", [[0, 0, 1, 2], [3, 2, 1, 0], [0, 1, 2, 8], [-1, 0, 1, 2], [0.0, 1.0, 2.0, 3.0]]
)
def test_places_that_repeat_or_lie_outside(path: Path, places: list[float]) -> None:
    change(path, first__4__put_back_index=torch.tensor(places))
    with pytest.raises(pf.PlanError, match=r"slim\.pt.*first\.4\.put_back_index"):
        pf.load(path, build)


def test_tensors_of_another_kind(path: Path) -> None:
    change(path, first__1__running_mean=torch.zeros(4, dtype=torch.int8))
    with pytest.raises(pf.PlanError, match=r"slim\.pt.*running_mean"):
        pf.load(path, build)


def test_what_is_whole_still_loads(path: Path, tmp_path: Path) -> None:
    before = pf.load(path, build)
    rezipped(path, {})  # as the attacks in tests/faults are made
    assert torch.equal(pf.load(path, build)(X), before(X))
    change(path)
    assert torch.equal(pf.load(path, build)(X), before(X))
    model, scales = prepared(Grouped)
    plan = pf.plan(model, X, scales)
    slim = pf.slim(model, plan)
    pf.save(slim, plan, tmp_path / "grouped.pt")
    again = pf.load(tmp_path / "grouped.pt", lambda: Grouped().double().eval())
    assert torch.equal(again(X), slim(X))
