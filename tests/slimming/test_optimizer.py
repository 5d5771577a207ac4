"""An optimizer follows its model: groups and state are cut, and training goes on as before."""

import pytest
import torch
from support.nets import Residual, settle, zero
from torch import nn

import polarfast as pf

X = torch.randn(4, 3, 10, 10, dtype=torch.float64)
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-4, amsgrad=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-4, momentum=0.9),
}


def make(build_optimizer):
    model = settle(Residual(), torch.randn(4, 3, 10, 10))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = build_optimizer(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "lr": 0.002}]
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    scales = pf.scaling_factors(model, X, residual="expand")
    zero(scales)
    return model, scales, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_with_the_parameters(name):
    model, scales, optimizer = make(OPTIMIZERS[name])
    old_state = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    plan = pf.plan(model, X, scales, "fixed", fold="none")
    slim = pf.slim(model, plan, optimizer=optimizer)
    params = dict(slim.named_parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in params.values()
    }
    assert [g["lr"] for g in optimizer.param_groups] == [optimizer.defaults["lr"], 0.002]
    kept = plan.kept
    cuts = {  # by hand, for the block with the identity shortcut
        "first.0.weight": (kept["first.1.weight"], None),
        "first.1.weight": (kept["first.1.weight"], None),
        "first.3.weight": (kept["first.4.weight"], kept["first.1.weight"]),
        "first.4.bias": (kept["first.4.weight"], None),
        "stem.0.weight": (None, None),
    }
    for parameter, (rows, columns) in cuts.items():
        for key, old in old_state[parameter].items():
            new = optimizer.state[params[parameter]][key]
            if isinstance(old, torch.Tensor) and old.dim():
                old = old if rows is None else old[rows]
                old = old if columns is None else old[:, columns]
            assert torch.equal(torch.as_tensor(new), torch.as_tensor(old)), (parameter, key)
    slim(X).square().sum().backward()
    optimizer.step()


def test_training_goes_on_as_the_masked_network_would():
    """With β = γ = 0 removed channels are dead, so a slim step is the masked network's step."""
    model, scales, optimizer = make(OPTIMIZERS["sgd"])
    plan = pf.plan(model, X, scales, "fixed", fold="none")
    with torch.no_grad():
        for name, kept in plan.kept.items():
            gone = torch.ones(scales[name].numel(), dtype=torch.bool)
            gone[kept] = False
            for tensor in (name, name.replace("weight", "bias")):
                param = model.get_parameter(tensor)
                param[gone] = 0
                optimizer.state[param]["momentum_buffer"][gone] = 0
    twin = pf.slim(model, plan)
    slim = pf.slim(model, plan, optimizer=optimizer)
    before = {n: p.detach().clone() for n, p in slim.named_parameters()}
    velocity = {
        n: optimizer.state[p]["momentum_buffer"].clone() for n, p in slim.named_parameters()
    }
    twin(X).square().sum().backward()
    grads = {n: p.grad for n, p in twin.named_parameters()}
    optimizer.zero_grad()
    slim(X).square().sum().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = next(n for n, p in slim.named_parameters() if p is param)
            step = 0.9 * velocity[name] + grads[name] + group["weight_decay"] * before[name]
            assert torch.allclose(param, before[name] - group["lr"] * step, atol=1e-12), name


def test_a_created_bias_joins_its_weights_group():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    model = settle(net, torch.randn(4, 3, 10, 10))
    optimizer = torch.optim.Adam(model.parameters())
    scales = pf.scaling_factors(model, X)
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X, scales, "fixed"), optimizer=optimizer)
    assert slim[2].bias is not None
    assert any(param is slim[2].bias for param in optimizer.param_groups[0]["params"])


def test_state_that_cannot_be_cut_leaves_the_optimizer_alone():
    model, scales, optimizer = make(OPTIMIZERS["sgd"])
    odd = model.get_parameter("first.0.weight")
    optimizer.state[odd]["factored"] = torch.zeros(5)
    groups = [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(pf.PlanError, match="'factored' of first.0.weight"):
        pf.slim(model, pf.plan(model, X, scales, "fixed"), optimizer=optimizer)
    assert all(
        a is b
        for group, params in zip(optimizer.param_groups, groups, strict=True)
        for a, b in zip(group["params"], params, strict=True)
    )
    assert "factored" in optimizer.state[odd]
