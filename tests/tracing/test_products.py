"""Activations that are multiplied: a channel goes only where γ makes all of it 0."""

import pytest
import torch
import torch.nn.functional as F
from support.hard_nets import Net, body, tail
from support.masked import TOLERANCE, error, masked
from support.nets import X, conv_bn, prepared
from torch import Tensor, nn

import polarfast as pf


def bare(c_out: int = 8) -> nn.Module:
    return nn.Conv2d(3, c_out, 3, padding=1)


def gate(net: nn.Module, x: Tensor) -> Tensor:
    """One number in 0…1 for each channel of each image."""
    return torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True)))


def excited(order: str):
    """A squeeze-excite branch beside its shortcut; the gate as the first or second factor."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        y = net.b(x)
        return net.end((gate(net, y) * y if order == "first" else y * gate(net, y)) + x)

    return lambda: of(forward, a=body(), b=body(8, 8), gate=nn.Conv2d(8, 8, 1))


def factor_read(net: nn.Module, x: Tensor) -> Tensor:
    factor = net.bare(x)
    return net.end(net.a(x) * factor) + net.other(factor)


def before_its_norm(net: nn.Module, x: Tensor) -> Tensor:
    factor = net.c(x)
    return net.end(net.bare(x) * factor) + net.other(F.relu(net.norm(factor)))


def end() -> nn.Module:
    return nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6))


def of(forward, **modules: nn.Module) -> Net:
    return Net(forward, **modules, end=end())


def attended(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.end(x + x * gate(net, x) + gate(net, x.abs()) * x)


#: Network -> layers of which half the channels go, by mode, but for the last one's.
NETS = {
    "gate first, then a sum": (excited("first"), ([], ["b"], ["a", "b"])),
    "gate second, then a sum": (excited("second"), ([], ["b"], ["a", "b"])),
    "product and a bare branch": (
        lambda: of(
            lambda n, x: n.end(n.a(x) * n.b(x) + n.bare(x)), a=body(), b=body(), bare=bare()
        ),
        ([], ["a", "b"], []),
    ),
    "GLU and a bare branch": (
        lambda: of(
            lambda n, x: n.end(F.glu(n.a(x), 1) + n.bare(x)),
            a=nn.Sequential(*conv_bn(3, 16)),
            bare=bare(),
        ),
        ([], ["a"], []),
    ),
    "factor read elsewhere": (
        lambda: of(factor_read, a=body(), bare=bare(), other=end()),
        ([], [], []),
    ),
    "factor before its norm": (
        lambda: of(before_its_norm, c=bare(), norm=nn.BatchNorm2d(8), bare=bare(), other=end()),
        ([], [], []),
    ),
    "factor behind a sigmoid": (
        lambda: of(
            lambda n, x: n.end(n.bare(x) * torch.sigmoid(n.a(x))),
            a=nn.Sequential(*conv_bn(3, 8)),
            bare=bare(),
        ),
        ([], [], []),
    ),
    "divisor": (
        lambda: of(lambda n, x: n.end(n.bare(x) / (2 + n.a(x))), a=body(), bare=bare()),
        ([], [], []),
    ),
    "factor behind SiLU": (
        lambda: of(
            lambda n, x: n.end(n.bare(x) * F.silu(n.a(x))),
            a=nn.Sequential(*conv_bn(3, 8)),
            bare=bare(),
        ),
        (["a"], ["a"], ["a"]),
    ),
    "products of one factor": (
        lambda: of(attended, a=body(), gate=nn.Conv2d(8, 8, 1)),
        (["a"], ["a"], ["a"]),
    ),
    "product, then its norm": (
        lambda: of(
            lambda n, x: n.end(F.relu(n.norm(torch.sigmoid(n.other(x)) * n.c(x)))),
            c=bare(),
            other=bare(),
            norm=nn.BatchNorm2d(8),
        ),
        (["norm"], ["norm"], ["norm"]),
    ),
}


@pytest.mark.parametrize("mode", ["keep", "expand", "couple"])
@pytest.mark.parametrize("name", NETS)
def test_what_goes_is_nothing(name, mode):
    """With γ = β = 0 on the channels asked for, and what goes of them: the same function."""
    build, layers = NETS[name]
    model, scales = prepared(build, mode)
    with torch.no_grad():
        for gamma in scales:
            norm = model.get_submodule(gamma.rpartition(".")[0])
            norm.bias[norm.weight == 0] = 0
    plan = pf.plan(model, X, scales, "fixed", value=0.0, fold="none")
    parts = {gamma.partition(".")[0] for gamma in scales} - {"end", "other"}
    assert parts == set(layers[["keep", "expand", "couple"].index(mode)])
    if not any(layers):
        assert any("does not make 0" in why for why in scales.pinned.values())
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert error(masked(model, plan, zero_beta=True), slim) < TOLERANCE


def test_a_shortcut_of_another_gamma_is_not_the_branchs():
    """What is left of a sum when the branch's γ are 0, a trained shortcut, stays (ECAPA-TDNN)."""
    model, _ = prepared(excited("first"), "couple", share=0)
    scales = pf.scaling_factors(model, X, residual="couple")
    with torch.no_grad():
        scales["b.1.weight"][:] = 0
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    assert plan.kept["a.1.weight"].numel() == 8
