"""Taylor scores are the formula, written out; a channel that is nothing scores 0."""

import copy

import torch
import torch.nn.functional as F
from support.engine import TINY

import polarfast as pf
from polarfast.engine import models, scores
from polarfast.engine.data.plan import EpochPlan
from polarfast.engine.data.source import load


def test_taylor_is_the_formula() -> None:
    data = load(TINY.data, torch.device("cpu"))
    torch.manual_seed(0)
    model = models.build("resnet8", 10, 1)
    factors = pf.scaling_factors(model, data.example(), residual="expand")
    name = next(iter(factors))
    owner = name.removesuffix(".weight")
    with torch.no_grad():
        factors[name][0] = model.get_submodule(owner).bias[0] = 0  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    found = scores.taylor(model.train(), factors, data, 24, seed=3)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert float(found[name][0]) == 0 and float(found[name][1:].min()) > 0

    expected = torch.zeros_like(factors[name])
    norm = model.eval().get_submodule(owner)
    for images, labels in data.train(EpochPlan(3, 24)):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        weight, bias = norm.weight, norm.bias
        expected += (weight * weight.grad + bias * bias.grad).detach() ** 2  # type: ignore[operator]
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-9)
