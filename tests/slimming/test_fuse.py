"""`fuse`: the same outputs with no normalization left where one can go, in every mode."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from support.nets import (
    NORMS,
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    X,
    chain,
    conv_bn,
    settle,
    zero,
)
from torch import nn

import polarfast as pf
from polarfast.layers import PutBackAlone

NETS = [chain, Residual, Bottlenecks, Branches, Grouped, SqueezeExcite]


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def same(one, other, x=X):
    with torch.no_grad():
        for each in (x, torch.rand_like(x)):
            torch.testing.assert_close(other(each), one(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", ["keep", "expand", "expand-all", "couple"])
@pytest.mark.parametrize("build", NETS)
def test_slim_models(build, residual):
    model = settle(build(), X)
    scales = pf.scaling_factors(model, X, residual=residual)
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X, scales))
    before = copy.deepcopy(slim)
    fused = pf.fuse(slim)
    same(slim, fused)
    same(before, slim)  # left as found
    assert norms(fused) == [] and not fused.training
    put_back = [m for m in slim.modules() if type(m).__name__.startswith("PutBack")]
    assert sum(isinstance(m, PutBackAlone) for m in fused.modules()) == len(put_back)


def test_gates():
    model = settle(Bottlenecks(), X)
    pf.add_gates(model, X, where="")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".gate"):
                param.uniform_(0.2, 1)
    fused = pf.fuse(model, X)
    same(model, fused)
    assert norms(fused) == [] and not any(n.endswith(".gate") for n, _ in fused.named_parameters())


class Odd(nn.Module):
    """What cannot be folded, beside what can."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.read = nn.Conv2d(3, 4, 1)
        self.beside = nn.BatchNorm2d(4)
        self.sum = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.batch = nn.BatchNorm2d(6, track_running_stats=False)
        self.fc, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.plain, self.bare = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False)

    def forward(self, x):
        x = self.b(self.twice(self.a(self.twice(x))))
        y = self.read(x)
        x = self.sum(self.beside(y) + y)
        x = self.norm(self.up(x))
        x = self.bare(self.plain(self.batch(x)))
        return self.last(self.fc(x.mean((2, 3))))


def test_what_cannot_be_folded_stays():
    model = settle(Odd(), X)
    fused = pf.fuse(model, X)
    same(model, fused)
    assert norms(fused) == ["a", "b", "beside", "sum", "batch"]


class Shared(nn.Module):
    """One norm behind two layers, and a layer of which a hook of the network makes more."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.tied, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 1)
        self.again.weight = self.tied.weight

    def forward(self, x):
        x = self.norm(self.one(x)) + self.norm(self.two(x))
        return self.again(self.last(self.tied(x)))


def test_what_is_shared_stays():
    model = settle(Shared(), X)
    fused = pf.fuse(model, X)
    same(model, fused)
    assert norms(fused) == ["norm", "last"]


class Looked(nn.Module):
    """Layers on which someone else depends, too; each line of `forward` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.body = nn.Sequential(self.conv, self.norm, nn.ReLU())  # second names
        self.returned, self.after = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.hooked, self.hook = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.square, self.behind = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.weighed, self.weighs = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.pruned, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.unused = nn.Conv2d(4, 4, 1)
        self.tied, self.ties = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.tied.weight = self.unused.weight
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        x = self.body(x)
        kept = self.returned(x)
        x = self.hook(self.hooked(self.after(kept)))
        x = self.weighs(self.weighed(x)) * self.weighs.weight.sum()
        x = self.last(self.pruned(x))
        x = self.ties(self.tied(x)).mean((2, 3))
        return self.behind(x @ self.square.weight), kept


def test_what_someone_else_looks_at_stays():
    model = settle(Looked(), X)
    with torch.no_grad():
        torch.nn.utils.prune.random_unstructured(model.pruned, "bias", 0.5)
    model.hook.register_forward_hook(lambda module, args, out: out * 2)
    fused = pf.fuse(model, X)
    runs = float(model.runs)
    assert float(fused.runs) == runs  # nor was it run
    for one, other in zip(model(X), fused(X), strict=True):
        torch.testing.assert_close(one, other)
    assert norms(fused) == ["after", "hook", "behind", "weighs", "last", "ties"]
    assert isinstance(fused.norm, nn.Identity) and fused.norm is fused.body[1]


class Ways(nn.Module):
    """Another way for another example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, plain=False):
        return self.conv(x) if plain else self.norm(self.conv(x))


def test_each_example_counts():
    model = settle(Ways(), X)
    assert norms(pf.fuse(model, X)) == []
    assert norms(pf.fuse(model, [(X, False), (X, True)])) == ["norm"]


def test_dtypes_and_refusals(tmp_path):
    model = settle(Residual(), X).float()
    scales = pf.scaling_factors(model, X.float(), residual="expand")
    zero(scales)
    plan = pf.plan(model, X.float(), scales)
    slim = pf.slim(model, plan)
    pf.save(slim, plan, tmp_path / "slim.pt")
    fused = pf.fuse(pf.load(tmp_path / "slim.pt", Residual))
    torch.testing.assert_close(fused(X.float()), slim(X.float()), rtol=1e-4, atol=1e-4)
    with pytest.raises(pf.ArgumentError, match="example_inputs: pass what the model takes"):
        pf.fuse(model)
    with pytest.raises(pf.FileFormatError):
        pf.save(fused, plan, tmp_path / "fused.pt")
    assert all(param.dtype == torch.float32 for param in pf.fuse(model, X).parameters())
    network = nn.Sequential(*conv_bn(3, 4)).bfloat16().eval()
    assert norms(pf.fuse(network, X.bfloat16())) == []


def test_exported_and_compiled():
    model = settle(Residual(), X).float()
    scales = pf.scaling_factors(model, X.float(), residual="expand")
    zero(scales)
    fused = pf.fuse(pf.slim(model, pf.plan(model, X.float(), scales)))
    exported = torch.export.export(fused, (X.float(),)).module()
    torch.testing.assert_close(exported(X.float()), fused(X.float()))
