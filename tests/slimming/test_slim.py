"""The slim model equals the original with γ (and β) zeroed on the removed channels."""

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from support.masked import TOLERANCE, continued, error, masked
from support.nets import (
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    X,
    chain,
    conv_bn,
    empty,
    prepared,
    settle,
    zero,
)
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import resnet, vgg16_bn


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", [chain, Residual, Branches, Grouped, Bottlenecks, SqueezeExcite])
def test_zero_test(build, residual):
    model, scales = prepared(build, residual)
    plan = pf.plan(model, X, scales, method="fixed", fold="none")
    slim = pf.slim(model, plan)
    assert plan.macs < plan.macs_before
    assert error(masked(model, plan, zero_beta=True), slim) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", [chain, Residual, Branches, Grouped])
def test_exact_fold_keeps_beta(build, residual):
    model, scales = prepared(build, residual)
    plan = pf.plan(model, X, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert error(masked(model, plan, zero_beta=False), slim) < TOLERANCE
    # The oracle can tell: what the authors' program does is another function.
    dropped = pf.slim(model, plan, fold="none")
    assert error(masked(model, plan, zero_beta=False), dropped) > 1e-3


@lru_cache(maxsize=1)  # the next one is another network
def of_the_papers(name: str) -> nn.Module:
    model = resnet(20) if name == "resnet20" else vgg16_bn()
    return settle(model, torch.randn(4, 3, 32, 32))


@lru_cache(maxsize=1)
def of_torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return settle(getattr(models, name)(num_classes=10), torch.randn(4, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "bias", "none"])
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_the_papers_cifar_networks(name, fold):
    model = copy.deepcopy(of_the_papers(name))
    convs = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    norms = [n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    readers = dict(zip(convs[1:], norms, strict=False))
    if name == "resnet20":  # what is put back in the sum is there as before
        readers = {conv: norm for conv, norm in readers.items() if conv.endswith("conv2")}
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    scales = pf.scaling_factors(model, x, residual="expand")
    zero(scales)
    plan = pf.plan(model, x, scales, fold=fold)
    slim = pf.slim(model, plan)
    reference = masked(model, plan, zero_beta=fold == "none")
    assert bool(plan.inexact) == (fold == "bias")
    if fold == "bias":
        assert error(reference, slim, (3, 32, 32)) > 1e-6
        continued(reference, plan, readers)
    assert error(reference, slim, (3, 32, 32)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "none"])
@pytest.mark.parametrize("residual", ["expand", "couple"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_torchvision_networks(name, residual, fold):
    model = copy.deepcopy(of_torchvision(name))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    scales = pf.scaling_factors(model, x, residual=residual)
    zero(scales)
    plan = pf.plan(model, x, scales, fold=fold)
    slim = pf.slim(model, plan)
    found = error(masked(model, plan, zero_beta=fold == "none"), slim, (3, 64, 64))
    if name == "mobilenet_v2" and fold == "exact":
        # Constants through padded depthwise convolutions: measured, and named reader by reader.
        assert found > TOLERANCE and plan.inexact
        assert pf.verify(model, slim, plan, x).notes == plan.inexact
    else:
        assert found < TOLERANCE and not plan.inexact


@pytest.mark.slow
@pytest.mark.parametrize(
    "act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.PReLU, nn.Tanh]
)
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 0), (3, 1), (1, 1), (5, 2)])
def test_activations(act, kernel, padding):
    model, scales = prepared(lambda: chain(act, kernel, padding))
    for fold in ("exact", "none"):
        plan = pf.plan(model, X, scales, method="fixed", fold=fold)
        assert error(masked(model, plan, fold == "none"), pf.slim(model, plan)) < TOLERANCE
        # Without padding a constant is a bias; with it, one constant channel carries its shape.
        needed = fold == "exact" or act is nn.Sigmoid
        constant = sum(len(layer.constant) for layer in plan.layers.values())
        assert constant == (1 if padding and needed else 0)


POOLS = {
    "max": nn.MaxPool2d(3, 2, 1),
    "average, padding counted": nn.AvgPool2d(3, 2, 1, count_include_pad=True),
    "average, padding not counted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "upsample": nn.Upsample(scale_factor=2),
    "dropout": nn.Dropout(0.5),
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_between_a_channel_and_its_reader(pool, kernel):
    def build() -> nn.Module:
        return nn.Sequential(
            *conv_bn(3, 8), nn.SiLU(), POOLS[pool], *conv_bn(8, 6, kernel), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip

    model, scales = prepared(build)
    plan = pf.plan(model, X, scales, method="fixed")
    assert not plan.inexact
    assert error(masked(model, plan, False), pf.slim(model, plan)) < TOLERANCE


def test_several_readers_of_one_channel_and_preactivation():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*conv_bn(3, 8))
            self.one, self.two = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 3, padding=1, bias=False)
            self.three = nn.Conv2d(8, 5, 3)
            self.norm = nn.BatchNorm2d(8)  # a second norm over the same channels, per channel
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.stem(x))
            y = F.relu(self.norm(x))
            out = self.one(y) + self.two(x)
            return self.fc((out[:, :, 1:-1, 1:-1] + self.three(x)).mean((2, 3)).tanh())

    model, scales = prepared(Net)
    assert list(scales) == ["stem.1.weight"] and "norm.weight" in scales.pinned
    for fold in ("exact", "none"):
        plan = pf.plan(model, X, scales, method="fixed", fold=fold)
        slim = pf.slim(model, plan)
        assert not plan.inexact
        assert error(masked(model, plan, fold == "none"), slim) < TOLERANCE


READERS = {"first.0": "stem.1", "second.0": "stem.1", "first.3": "first.1", "second.3": "second.1"}


@pytest.mark.parametrize("fold", ["exact", "bias", "none"])
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
def test_emptied_branches(residual, fold):
    model, scales = prepared(Residual, residual)
    for names in (["first.1.weight"], [n for n in scales if n.startswith("first")]):
        empty(scales, names)
        plan = pf.plan(model, X, scales, fold=fold)
        slim, reference = pf.slim(model, plan), masked(model, plan, fold == "none")
        if fold == "bias":
            continued(reference, plan, READERS)
        assert error(reference, slim) < TOLERANCE
        # So it stays in training: no constant is cancelled by the statistics of a batch.
        losses = [net.train()(X).square().mean() for net in (reference, slim)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(slim.fc.bias.grad, reference.fc.bias.grad)
        assert error(reference.eval(), slim) < TOLERANCE


def test_a_constant_channel_stays_silent_in_fine_tuning():
    model, scales = prepared(chain)
    plan = pf.plan(model, X, scales, method="fixed")
    slim = pf.slim(model, plan).train()
    place = sorted([*plan.kept["1.weight"].tolist(), *plan.layers["1.weight"].constant])
    position = place.index(plan.layers["1.weight"].constant[0])
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(slim(torch.randn_like(X)), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    assert float(slim[1].weight[position]) == 0
    assert not bool(slim[0].weight[position].any())
    assert float(slim[1].bias[position]) != 0


def test_the_slim_model_is_like_the_original():
    model, scales = prepared(Residual, "expand")
    model.fc.weight.requires_grad_(False)
    model.first[1].weight.requires_grad_(False)
    model.second.train()
    model = model.to(memory_format=torch.channels_last)
    calls = []
    model.down.register_forward_hook(lambda *args: calls.append(1))
    model(X).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    slim = pf.slim(model, pf.plan(model, X, scales))
    for (name, a), b in zip(model.named_parameters(), slim.parameters(), strict=True):
        assert (a.requires_grad, a.dtype) == (b.requires_grad, b.dtype), name
        assert b.grad is None
        if a.dim() == 4 and a.shape == b.shape:
            assert a.stride() == b.stride()
    assert slim.first[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [m.training for m in model.modules()] == [m.training for m in slim.modules()]
    count = len(calls)
    slim(X)
    assert len(calls) == count + 1
    assert type(slim) is type(model) and isinstance(slim.first[4], nn.BatchNorm2d)
    # and the original is untouched
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(grad is None for grad in grads) == 2  # the frozen ones
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.grad is grad is None or torch.equal(param.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model, scales = prepared(Residual, "couple")
    model = model.to(dtype)
    x = X.to(dtype)
    plan = pf.plan(model, x, pf.scaling_factors(model, x, residual="couple"))
    slim = pf.slim(model, plan)
    assert {param.dtype for param in slim.parameters()} == {dtype}
    assert pf.verify(model, slim, plan, x).exact


def test_a_plan_fits_models_built_alike_and_no_others():
    model, scales = prepared(Residual, "couple")
    plan = pf.plan(model, X, scales)
    twin = settle(Residual(), torch.randn(4, 3, 10, 10), seed=7)
    with torch.no_grad():
        for name in scales:
            twin.get_parameter(name)[scales[name] == 0] = 0
    slim = pf.slim(twin, plan)
    assert error(masked(twin, plan, False), slim) < TOLERANCE
    with pytest.raises(pf.PlanError, match="takes no part"):
        pf.slim(chain().double(), plan)
    with pytest.raises(pf.PlanError, match="already pruned"):
        pf.slim(slim, plan)
    broken = pf.PruningPlan.from_json(plan.to_json())
    broken.kept["down.1.weight"] = torch.arange(12)
    with pytest.raises(pf.PlanError, match="coupled"):
        pf.slim(model, broken)
    with pytest.raises(pf.ArgumentError, match="fold='some'"):
        pf.slim(model, plan, fold="some")


def test_a_size_fixed_in_the_code_is_refused_by_name_of_the_cure():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            assert x.shape[1] == 8
            return self.fc(x.flatten(1))

    model, scales = prepared(Fixed)
    with pytest.raises(pf.VerificationError, match="AssertionError.*hard-coded.*scales.select"):
        pf.slim(model, pf.plan(model, X, scales))
