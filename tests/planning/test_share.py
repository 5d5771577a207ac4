"""A share to cut: constant channels are foretold as the network shows them."""

import pytest
import torch
from support.nets import Bottlenecks, Branches, Grouped, Residual, chain, conv_bn, settle
from torch import nn

import polarfast as pf
from polarfast.inputs import Inputs
from polarfast.planning.limits import Limits
from polarfast.planning.selection import Chooser
from polarfast.planning.share import _Trials
from polarfast.planning.thresholds import Ranking, magnitudes
from polarfast.tracing.classes import trace_channels

X = torch.randn(2, 3, 10, 10, dtype=torch.float64)


class Blocks(nn.Module):
    """Four branches of three padded convolutions each, any of which may disappear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 5), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1)
            )
            for _ in range(4)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", [Blocks, chain, Residual, Branches, Bottlenecks, Grouped])
def test_what_is_foretold_is_what_the_network_shows(build, residual):
    for seed in range(3):
        model = settle(build(), X, seed=seed)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.1, 1)
                    module.bias.normal_()
        channels = trace_channels(model, X, residual)
        scales = pf.scaling_factors(model, X, residual=residual)
        sizes = {name: gamma.numel() for name, gamma in scales.items()}
        limits = Limits.of(sizes)
        chooser = Chooser(model, channels, Inputs.of(X), scales, "exact", limits)
        trials = _Trials(chooser, Ranking(magnitudes(scales)))
        count = trials.ranking.count
        for n in {0, 1, count // 3, count // 2, count - 6, count - 3, count - 1, count}:
            assert trials.foreseen(n)["macs"] == trials.really(n).shares["macs"], (seed, n)
