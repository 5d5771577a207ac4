"""Small networks in which other pruners, and earlier versions of this one, went wrong."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.nets import conv_bn


def tail(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


class Net(nn.Module):
    """A network given by its modules and its forward."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor):
        return self._forward(self, x)


def body(c_in=3, c_out=8) -> nn.Sequential:
    return nn.Sequential(*conv_bn(c_in, c_out), nn.ReLU())


def functional(net: nn.Module, x: Tensor) -> Tensor:
    x = F.conv2d(net.a(x), net.hold.weight.clone()) + net.hold.bias2.view(-1, 1, 1)
    return net.end(F.relu(x))


def functional_net() -> Net:
    hold = nn.Module()
    hold.weight = nn.Parameter(torch.randn(6, 8, 1, 1))
    hold.bias2 = nn.Parameter(torch.randn(6))
    return Net(functional, a=body(), hold=hold, end=nn.Sequential(*tail(6)))


def se(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    gate = torch.sigmoid(net.up(F.silu(net.down(x.mean((2, 3), keepdim=True)))))
    return net.end(x * gate)


def before_se() -> nn.Sequential:
    """conv-ReLU-norm: a constant of the first layer cannot go into the second norm's mean."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.BatchNorm2d(8), *conv_bn(8, 6, 1), nn.SiLU(),
    )  # fmt: skip


def twice(net: nn.Module, x: Tensor) -> Tensor:
    parts = [net.shared(net.a(x)).mean((2, 3)), net.shared(net.b(x)).mean((2, 3))]
    return net.fc(torch.cat(parts, 1))


class Scaled(nn.Module):
    """A constant per channel that is no part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = body(), nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6))
        self.register_buffer("scale", torch.linspace(1, 2, 8).view(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


def never_used() -> nn.Module:
    net = Net(
        lambda n, x: n.end(n.a(x)), a=body(), end=nn.Sequential(*tail(8)), idle=nn.Linear(2, 2)
    )
    return net


def normed() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    return nn.Sequential(*conv_bn(3, 8), nn.ReLU(), conv, *conv_bn(8, 6), nn.ReLU(), *tail(6))


def circular() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    return nn.Sequential(*conv_bn(3, 8), nn.ReLU(), conv, *conv_bn(8, 6), nn.ReLU(), *tail(6))


def gate_of_one_channel(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.end(x * torch.sigmoid(net.gate(x)))


def in_buffer(net: nn.Module, x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], 16, 10, 10)
    out[:, :8] = net.a(x)
    out[:, 8:] = net.b(x)
    return net.end(net.join(out))


def channels_last_linear(net: nn.Module, x: Tensor) -> Tensor:
    return net.fc(F.relu(net.inner(net.a(x).permute(0, 2, 3, 1))).mean((1, 2)))


EXACT = {
    "weight that is no layer's": functional_net,
    "conv, activation, norm": lambda: nn.Sequential(*before_se(), *tail(6)),
    "conv, scale, norm": lambda: Net(
        lambda n, x: n.end(n.norm(n.conv(n.a(x)) * 0.5)),
        a=body(), conv=nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d(8),
        end=nn.Sequential(*conv_bn(8, 6, 1), nn.ReLU(), *tail(6)),
    ),
    "norm without bias": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, bias=False), nn.ReLU(),
        *conv_bn(8, 6), nn.ReLU(), *tail(6),
    ),
    "linear over the last dimension": lambda: Net(
        channels_last_linear, a=body(), inner=nn.Linear(8, 6), fc=nn.Linear(6, 3)
    ),
    "buffer outside the state dict": Scaled,
    "module that never runs": never_used,
    "weight norm": normed,
    "circular padding": circular,
    "channels padded with a constant": lambda: Net(
        lambda n, x: n.end(n.b(F.pad(n.a(x), (0, 0, 0, 0, 2, 1), value=1.5))),
        a=body(), b=body(11, 6), end=nn.Sequential(*tail(6)),
    ),
    "image padded by hand": lambda: Net(
        lambda n, x: n.end(n.b(F.pad(n.a(x), (2, 1, 0, 1)))),
        a=body(), b=nn.Sequential(*conv_bn(8, 6, 3, padding=0), nn.ReLU()),
        end=nn.Sequential(*tail(6)),
    ),
    "input changed in place": lambda: Net(
        lambda n, x: n.end(n.a(x.sub_(1))), a=body(), end=nn.Sequential(*tail(8))
    ),
    "written into a fresh buffer": lambda: Net(
        in_buffer, a=body(), b=body(), join=body(16, 6), end=nn.Sequential(*tail(6))
    ),
    "unbatched pooling": lambda: Net(
        lambda n, x: n.end(torch.stack([F.max_pool2d(y, (2, 1)) for y in n.a(x)])),
        a=body(), end=nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6)),
    ),
    "square root of the input": lambda: Net(
        lambda n, x: n.end(n.a(x.clamp(min=-9).add(9).sqrt())), a=body(),
        end=nn.Sequential(*tail(8)),
    ),
    "view changed in place": lambda: Net(
        lambda n, x: n.end(F.hardtanh(n.a(x)).unsqueeze_(0).squeeze(0)),
        a=body(), end=nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6)),
    ),
}  # fmt: skip
INEXACT = {
    "gate of one channel": lambda: Net(
        gate_of_one_channel, a=body(), gate=nn.Sequential(*conv_bn(8, 1)),
        end=nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6)),
    ),
    "squeeze-excite behind an exact reader": lambda: Net(
        se, a=before_se(), down=nn.Conv2d(6, 2, 1), up=nn.Conv2d(2, 6, 1),
        end=nn.Sequential(*conv_bn(6, 6, 1), nn.ReLU(), *tail(6)),
    ),
    "one convolution on two inputs": lambda: Net(
        twice, a=body(), b=body(), shared=nn.Conv2d(8, 6, 1, bias=False), fc=nn.Linear(12, 3)
    ),
}  # fmt: skip
