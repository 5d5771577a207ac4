"""What "expand", "expand-all" and "couple" do where channels meet in additions."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.hard_nets import Net, body, tail
from support.masked import TOLERANCE, error, masked
from support.nets import Bottlenecks, Residual, X, conv_bn, prepared
from torch import Tensor, nn

import polarfast as pf


class NormAct(nn.BatchNorm2d):
    """A norm with something behind it, as timm's."""

    def __init__(self, width: int, act: nn.Module | None = None) -> None:
        super().__init__(width)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Parallel(nn.Module):
    """Parallel branches, one convolution and norm each, and a norm alone where the width stays
    (RepVGG's block).
    """

    def __init__(self, n_in: int, n_out: int, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), norm(n_out))
        self.thin = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), norm(n_out))
        self.norm = norm(n_in) if n_in == n_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.thin(x) + self.wide(x)
        return F.relu(out if self.norm is None else out + self.norm(x))


def parallel(norm: Any = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        Parallel(3, 8, norm), Parallel(8, 10, norm), Parallel(10, 10, norm), *tail(10)
    )


def depthwise_shortcut() -> nn.Module:
    """x + norm(depthwise(x)): a channel meets nothing but itself."""
    return Net(
        lambda n, x: n.end(F.relu((y := n.a(x)) + n.b(y))),
        a=body(), b=nn.Sequential(*conv_bn(8, 8, 1, groups=8)),
        end=nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6)),
    )  # fmt: skip


NETS = {
    "residual": Residual,
    "inverted residual": Bottlenecks,
    "parallel branches": parallel,
    "parallel branches, derived norms": lambda: parallel(NormAct),
    "depthwise shortcut": depthwise_shortcut,
}


@pytest.mark.parametrize("mode", ["expand", "expand-all", "couple"])
@pytest.mark.parametrize("name", NETS)
def test_slim_equals_the_masked_network(name, mode):
    model, scales = prepared(NETS[name], mode)
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    assert bool(plan.inexact) == (name == "inverted residual")  # β through padded depthwise ones
    if not plan.inexact:
        assert error(masked(model, plan), slim) < TOLERANCE
    # Parallel branches that are coupled lose a channel where all of their γ agree.
    assert plan.params < plan.params_before or (name.startswith("parallel") and mode == "couple")


def test_all_that_writes_a_shortcut_takes_part():
    found = pf.scaling_factors(Residual(), X.float(), residual="expand-all")
    couple = pf.scaling_factors(Residual(), X.float(), residual="couple")
    assert list(found) == list(couple) and "stem.1.weight" in found and "down.1.weight" in found


def test_what_a_shortcut_through_a_norm_begins_with_takes_part():
    """The second block's sum, which the third one's norm reads beside its convolutions."""
    begins = {"1.thin.1.weight", "1.wide.1.weight"}
    expand = pf.scaling_factors(parallel(), X.float(), residual="expand")
    every = pf.scaling_factors(parallel(), X.float(), residual="expand-all")
    assert not begins & set(expand) and set(every) == {*expand, *begins}


def test_a_channel_of_a_sum_goes_where_it_goes_in_all_branches():
    model, scales = prepared(parallel, "expand", share=0)
    dead = {"0.thin.1.weight": [0, 1, 2], "0.wide.1.weight": [1, 2, 3], "2.thin.1.weight": [5]}
    with torch.no_grad():
        for name, places in dead.items():
            scales[name][places] = 0
    plan = pf.plan(model, X, scales, "fixed", fold="none")
    slim = pf.slim(model, plan)
    assert slim[0].thin[0].out_channels == slim[0].wide[0].out_channels == 6
    assert slim[1].wide[0].in_channels == 6  # nothing is put back where there is no shortcut
    # The third block adds its shortcut: there each branch puts back what it has lost by itself.
    assert (slim[2].thin[0].out_channels, slim[2].wide[0].out_channels) == (9, 10)
    assert slim[2].norm.num_features == 10
    assert error(masked(model, plan, True), slim) < TOLERANCE


def test_norms_that_do_more_do_not_put_back():
    def net(act: nn.Module | None) -> nn.Module:
        return Net(
            lambda n, x: n.end((y := n.a(x)) + n.norm(n.b(y))),
            a=body(), b=nn.Conv2d(8, 8, 3, padding=1), norm=NormAct(8, act),
            end=nn.Sequential(*tail(8)),
        )  # fmt: skip

    shown = {"identity": None, "relu": nn.ReLU(), "clipped": nn.Hardtanh(-2, 2)}
    taking_part = {
        name: list(pf.scaling_factors(net(act), X.float(), residual="expand-all"))
        for name, act in shown.items()
    }
    assert taking_part["identity"] == ["a.1.weight", "norm.weight"]
    assert taking_part["relu"] == taking_part["clipped"] == ["a.1.weight"]


@pytest.mark.parametrize("mode", ["keep", "expand", "expand-all", "couple"])
def test_a_channel_that_meets_itself_is_no_residual(mode):
    scales = pf.scaling_factors(depthwise_shortcut(), X.float(), residual=mode)
    assert "a.1.weight" in scales


def test_the_papers_layers_of_mobilenet_v2():
    mobilenet = pytest.importorskip("torchvision").models.mobilenet_v2()
    scales = pf.scaling_factors(mobilenet, torch.zeros(1, 3, 32, 32), residual="expand-all")
    names = set(scales.select(r"features\.\d+\.conv"))
    first = {"features.1.conv.2.weight"}
    blocks = itertools.product(range(2, 18), ("0.1", "3"))
    assert names == first | {f"features.{i}.conv.{j}.weight" for i, j in blocks}
    assert len(names) == 33  # 17 projections, 16 expansions


def test_norms_of_derived_classes_on_the_meta_device_and_with_asserts(tmp_path):
    class Strict(NormAct):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] > 4, "small"
            return super().forward(x)

    def net(kind: Any = NormAct) -> nn.Module:
        return Net(
            lambda n, x: n.end((y := n.a(x)) + n.norm(n.b(y))),
            a=body(), b=nn.Conv2d(8, 8, 3, padding=1), norm=kind(8), end=nn.Sequential(*tail(8)),
        )  # fmt: skip

    assert "norm.weight" not in pf.scaling_factors(net(Strict), X.float(), "expand-all")
    model, scales = prepared(net, "expand")
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    pf.save(slim, plan, tmp_path / "slim.pt")

    def empty() -> nn.Module:
        with torch.device("meta"):
            return net().double()

    loaded = pf.load(tmp_path / "slim.pt", empty).eval()
    assert torch.equal(loaded(X), slim(X))
