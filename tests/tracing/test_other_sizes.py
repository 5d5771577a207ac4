"""Code that fixes a number of channels, or makes something by the number of other channels, in ways
that no slim model can follow: the layer is pinned, and it says why.
"""

import pytest
import torch
import torch.nn.functional as F
from support.nets import settle, zero
from torch import nn

import polarfast as pf

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block(c_in, c_out, kernel=3):
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def added_into_a_view(net, x):
    y = torch.zeros(2, 12, 8, 8, dtype=x.dtype)
    y[:, :8].add_(net.a(x))
    return y


def normalized_by_another(net, x):
    style = net.a(x).mean((0, 2, 3))
    return F.batch_norm(net.plain(x), None, None, style, None, True)


NETWORKS = {
    "expand": lambda net, x: net.a(x).mean((2, 3), keepdim=True).expand(2, 8, 8, 8),
    "broadcast_to": lambda net, x: torch.broadcast_to(net.a(x), (2, 8, 8, 8)),
    "view_as": lambda net, x: net.a(x).view_as(torch.zeros(2, 8, 8, 8)),
    "an input as often as there are channels": lambda net, x: torch.cat(
        [net.a(x), x[:, :1].repeat(1, net.a(x).shape[1], 1, 1)], 1
    ),
    "an input expanded": lambda net, x: torch.cat(
        [net.a(x), x[:, :1].expand(-1, net.a(x).shape[1], -1, -1)], 1
    ),
    "an input expanded like another": lambda net, x: torch.cat(
        [net.a(x), x[:, :1].expand_as(net.a(x))], 1
    ),
    "a mask for other channels": lambda net, x: torch.cat(
        [x[:, :1].expand_as(net.a(x)) * net.plain(x), net.a(x)], 1
    ),
    "a repeated mask alone": lambda net, x: torch.cat(
        [x[:, :1].expand_as(net.a(x)).sigmoid().flip(2), net.a(x)], 1
    ),
    "broadcast together": lambda net, x: torch.cat(torch.broadcast_tensors(net.a(x), x[:, :1]), 1),
    "a larger new tensor": lambda net, x: torch.cat(
        [net.a(x), torch.zeros(2, 2 * net.a(x).shape[1], 8, 8, dtype=x.dtype)], 1
    ),
    "numbers beside": lambda net, x: torch.cat(
        [net.a(x), torch.arange(net.a(x).shape[1]).view(1, -1, 1, 1).expand(2, -1, 8, 8)], 1
    ),
    "random numbers beside": lambda net, x: torch.cat(
        [net.a(x), torch.rand(2, net.a(x).shape[1], 8, 8, dtype=x.dtype).clamp(max=0)], 1
    ),
    "divided by their number": lambda net, x: net.a(x) / net.a(x).shape[1],
    "pooled to as many places": lambda net, x: F.adaptive_avg_pool2d(
        x.mean(1, keepdim=True), (net.a(x).shape[1], 1)
    ).transpose(1, 2),
    "an empty one beside": lambda net, x: torch.cat(
        [net.a(x), torch.zeros(2, 8, 0, 8, dtype=x.dtype)], 2
    ),
    "joined across": lambda net, x: torch.cat([net.a(x), net.c(x).transpose(1, 2)], 2),
    "mixed along the places": lambda net, x: net.mix(net.a(x).flatten(2)).unflatten(2, (8, 8)),
    "added into a view": added_into_a_view,
    "a style": normalized_by_another,
}


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.run = forward
        self.a, self.c = block(3, 8), block(3, 8)
        self.plain, self.mix = nn.Conv2d(3, 8, 1), nn.Linear(64, 64)
        with torch.no_grad():
            channels = forward(self.eval(), X).shape[1]
        self.out = nn.Sequential(*block(channels, 8, 1), nn.Conv2d(8, 3, 1))

    def forward(self, x):
        return self.out(self.run(self, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_pins_and_the_rest_is_exact(name):
    model = settle(Net(NETWORKS[name]), X)
    x = X.double()
    scales = pf.scaling_factors(model, x)
    assert "a.1.weight" in scales.pinned
    assert "something" not in scales.pinned["a.1.weight"]  # it says what
    zero(scales)
    slim = pf.slim(model, pf.plan(model, x, scales, "fixed", value=0.0))
    with torch.no_grad():
        torch.testing.assert_close(slim(x), model(x), rtol=1e-8, atol=1e-8)
