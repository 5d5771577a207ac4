"""Averages of a slim model's weights, which are kept of its buffers, too."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support.nets import Residual, X, prepared
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import polarfast as pf

DECAYS = (0.5, 0.9, 0.9995, 0.9999, 0.99998)


def averaged(model: nn.Module, decay: float) -> Callable[[], nn.Module]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return lambda: (average.update_parameters(model), average.module)[1]


def averaged_one_by_one(model: nn.Module, decay: float) -> Callable[[], nn.Module]:
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(decay), use_buffers=True)
    return lambda: (average.update_parameters(model), average.module)[1]


def averaged_by_state(model: nn.Module, decay: float) -> Callable[[], nn.Module]:
    """As timm's ModelEmaV2."""
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> nn.Module:
        pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
        for own, new in pairs:
            own.copy_(decay * own + (1 - decay) * new)
        return average

    return update


def places(model: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in model.state_dict().items() if n.endswith("put_back_index")}


@pytest.fixture
def slim() -> nn.Module:
    model, scales = prepared(Residual, "expand")
    found = pf.slim(model, pf.plan(model, X, scales, "fixed"))
    assert sum(index.numel() for index in places(found).values()) > 4
    return found


@pytest.mark.parametrize("way", [averaged, averaged_one_by_one, averaged_by_state])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("then", ["run", "state", "copy", "pickle", "move", "fuse"])
def test_the_average_of_one_model_is_that_model(slim, way, decay, then) -> None:
    update = way(slim, decay)
    for _ in range(5):
        found = update()
        found(X)
    found = update()
    if then == "copy":
        found = copy.deepcopy(found)
    elif then == "pickle":
        found = pickle.loads(pickle.dumps(found))
    elif then == "move":
        found = found.to("cpu").double()
    elif then == "fuse":
        found = pf.fuse(found, X)
        torch.testing.assert_close(found(X), slim(X))
        return
    elif then == "state":
        for name, index in places(found).items():
            assert torch.equal(index, slim.state_dict()[name])
    torch.testing.assert_close(found(X), slim(X))


def test_places_that_are_loaded_are_the_places(slim) -> None:
    other = copy.deepcopy(slim)
    shifted = {
        n: v.flip(0) if n.endswith("put_back_index") else v for n, v in slim.state_dict().items()
    }
    other.load_state_dict(shifted)
    for _ in range(2):
        other(X)
    for name, index in places(other).items():
        assert torch.equal(index, shifted[name])
    swapped = torch.func.functional_call(slim, shifted, (X,))
    torch.testing.assert_close(swapped, other(X))
    slim(X)
    assert all(torch.equal(index, shifted[n].flip(0)) for n, index in places(slim).items())
