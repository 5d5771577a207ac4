"""Attention that reads a CNN's channels."""

import pytest
import torch
from support.masked import TOLERANCE, error, masked
from support.nets import X, conv_bn, prepared
from torch import Tensor, nn

import polarfast as pf


class Attends(nn.Module):
    """A CNN whose channels are keys and values, through a linear layer queries, or both."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.cnn = nn.Sequential(*conv_bn(3, 12), nn.ReLU())
        self.asks = nn.Parameter(torch.randn(1, 3, 8))
        self.linear = nn.Linear(12, 8)
        width, inner = (12, 12) if what == "tokens" else (12, 8)
        self.attention = nn.MultiheadAttention(inner, 2, kdim=width, vdim=width, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.what, self.fc = what, nn.Linear(inner, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x).flatten(2).transpose(1, 2)
        if self.what == "layer":
            return self.fc(self.layer(self.linear(x)).mean(1))
        if self.what == "tokens":
            query = x
        else:
            asks = self.what == "asks"
            query = self.asks.expand(len(x), -1, -1) if asks else self.linear(x)
        return self.fc(self.attention(query, x, x)[0].mean(1))


@pytest.mark.parametrize("what", ["asks", "linear", "layer"])
def test_keys_and_values_and_what_linear_layers_read(what):
    model, scales = prepared(lambda: Attends(what))
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    kept = slim.cnn[0].out_channels
    assert kept < 12 and slim.linear.in_features == (kept if what != "asks" else 12)
    assert slim.attention.k_proj_weight.shape[1] == (kept if what != "layer" else 12)
    assert not plan.inexact and error(masked(model, plan), slim) < TOLERANCE


def test_queries_are_as_wide_as_torchs_attention():
    with pytest.raises(pf.TracingError, match="query of attention, a torch.nn.MultiheadAttention"):
        pf.scaling_factors(Attends("tokens"), X.float())
