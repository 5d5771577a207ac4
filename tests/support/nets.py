"""Small networks for the tests, and ways to put a network into the state of a trained one."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polarfast as pf

#: Example images of these networks.
X = torch.randn(3, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, *, padding: int | None = None, **kw) -> list:
    pad = kernel // 2 if padding is None else padding
    return [nn.Conv2d(c_in, c_out, kernel, padding=pad, bias=False, **kw), nn.BatchNorm2d(c_out)]


def chain(act: Callable[[], nn.Module] = nn.ReLU, kernel: int = 3, padding: int = 1) -> nn.Module:
    """conv-norm-act three times, a bias in the last convolution, then a linear layer."""
    return nn.Sequential(
        *conv_bn(3, 8, kernel, padding=padding),
        act(),
        *conv_bn(8, 12, kernel, padding=padding),
        act(),
        nn.Conv2d(12, 10, 1),
        act(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(40, 5),
    )


class Residual(nn.Module):
    """Stem, a block with an identity shortcut, a block with a projection shortcut, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8))
        self.first = nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *conv_bn(6, 8))
        self.second = nn.Sequential(*conv_bn(8, 10, stride=2), nn.ReLU(), *conv_bn(10, 12))
        self.down = nn.Sequential(*conv_bn(8, 12, 1, stride=2))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.first(x))
        branch = self.second(x)
        branch += self.down(x)
        return self.fc(F.relu(branch).mean((2, 3)))


class Bottlenecks(nn.Module):
    """Inverted residuals: expansion, depthwise convolution, projection (MobileNetV2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU6())
        self.block = nn.Sequential(
            *conv_bn(8, 16, 1), nn.ReLU6(), *conv_bn(16, 16, groups=16), nn.ReLU6(),
            *conv_bn(16, 8, 1),
        )  # fmt: skip
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


class Branches(nn.Module):
    """Concatenated branches (Inception), one of them through a padded average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.left = nn.Sequential(*conv_bn(8, 6, 1), nn.ReLU())
        self.right = nn.Sequential(nn.AvgPool2d(3, 1, 1), *conv_bn(8, 6, 1), nn.ReLU())
        self.join = nn.Sequential(*conv_bn(12, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.join(torch.cat([self.left(x), self.right(x)], 1))
        return self.fc(x.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution between two norms (ResNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(3, 12), nn.ReLU(), *conv_bn(12, 16, groups=4), nn.ReLU(), *conv_bn(16, 6)
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.body(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A channel gate computed from the channels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.out = nn.Sequential(*conv_bn(12, 6, 1))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.fc(F.relu(self.out(x * gate)).mean((2, 3)))


@torch.no_grad()
def settle(model: nn.Module, *inputs: Tensor, seed: int = 0) -> nn.Module:
    """As trained, in float64 and eval mode: random γ and β, statistics of real activations."""
    torch.manual_seed(seed)
    model.double().train()
    for module in model.modules():
        if isinstance(module, NORMS):
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.0)
            if module.bias is not None:
                module.bias.normal_()
            module.momentum = 1.0
    model(*(x.double() for x in inputs))
    for module in model.modules():
        if isinstance(module, NORMS):
            module.momentum = 0.1
    return model.eval()


@torch.no_grad()
def zero(scales: dict, share: float = 0.5, seed: int = 1) -> None:
    """Set a random share of every layer's γ to 0."""
    generator = torch.Generator().manual_seed(seed)
    for gamma in scales.values():
        order = torch.randperm(gamma.numel(), generator=generator)
        gamma[order[: int(share * gamma.numel())]] = 0


@torch.no_grad()
def empty(scales: dict, names: Iterable[str]) -> None:
    """Set all γ of the named layers to 0."""
    for name in names:
        scales[name].zero_()


def prepared(
    build: Callable[[], nn.Module],
    residual: str = "keep",
    *,
    share: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    x: Tensor = X,
) -> tuple[nn.Module, pf.ScalingFactors]:
    """A network as trained, and its scaling factors, a share of every layer's at 0."""
    torch.manual_seed(seed)
    model = settle(build(), torch.randn(4, *x.shape[1:]), seed=seed).to(dtype)
    scales = pf.scaling_factors(model, x.to(dtype), residual=residual)
    zero(scales, share)
    return model, scales
