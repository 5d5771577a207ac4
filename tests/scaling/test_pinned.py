"""What pinned layers cost. The oracle: MACs that torch counts of networks built by hand with other
widths. They are linear in each width, so two widths tell what is left at width 0.
"""

import pytest
import torch
import torch.nn.functional as F
from support.random_nets import Program
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf
from polarfast.tracing.classes import WITH_THE_LAYER_BEFORE

X = torch.randn(2, 3, 12, 12)


def cbr(c_in, c_out, kernel=3, **kw):
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, padding=pad, bias=False, **kw),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


class Split(nn.Module):
    """Half of the channels go on through a convolution, at a number fixed in the code (Res2Net)."""

    def __init__(self, first, free, last=6):
        super().__init__()
        self.half = first // 2
        self.a, self.b = cbr(3, first), cbr(self.half, free)
        self.c = cbr(free + self.half, last)

    def forward(self, x):
        one, two = self.a(x).split(self.half, 1)
        return self.c(torch.cat([self.b(one), two], 1))


class Excited(nn.Module):
    """The same behind a squeeze-excite gate, whose layers go with what they multiply."""

    def __init__(self, first, free):
        super().__init__()
        self.half = first // 2
        self.a, self.squeeze, self.excite = cbr(3, first), nn.Linear(first, 5), nn.Linear(5, first)
        self.b, self.c = cbr(self.half, free), nn.Conv2d(free, 4, 1)

    def forward(self, x):
        x = self.a(x)
        x = x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[..., None, None]
        one, two = x.split(self.half, 1)
        return self.c(self.b(one * two))


class Block(nn.Module):
    """A branch and its identity shortcut. In "expand" the branch's end may be narrower."""

    def __init__(self, stream, free, end=None):
        super().__init__()
        self.more = 0 if end is None else stream - end
        self.stem, self.one = cbr(3, stream), cbr(stream, free)
        self.two = cbr(free, stream if end is None else end)[:2]
        self.fc = nn.Linear(stream, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + F.pad(self.two(self.one(x)), (0, 0, 0, 0, 0, self.more))
        return self.fc(x.relu().mean((2, 3)))


class Inverted(nn.Module):
    """A stem, a depthwise layer on its channels, and a block, which makes it a residual network."""

    def __init__(self, stem, stream, free):
        super().__init__()
        self.stem, self.dw = cbr(3, stem), cbr(stem, stem, groups=stem)
        self.point, self.one = cbr(stem, stream, 1), cbr(stream, free, 1)
        self.two, self.fc = cbr(free, stream, 1)[:2], nn.Linear(stream, 4)

    def forward(self, x):
        x = self.point(self.dw(self.stem(x)))
        return self.fc((x + self.two(self.one(x))).mean((2, 3)))


ADDS = "meet in an addition"
#: Name -> network, residual mode, widths, those that can go, reason -> those that it keeps.
CASES = {
    "split": (
        Split,
        "keep",
        {"first": 8, "free": 12, "last": 6},
        ["free"],
        {"constant": ["first"], "output": ["last"]},
    ),
    "squeeze-excite": (Excited, "keep", {"first": 8, "free": 6}, ["free"], {"constant": ["first"]}),
    "addition": (Block, "keep", {"stream": 8, "free": 6}, ["free"], {ADDS: ["stream"]}),
    "shortcut": (
        Block,
        "expand",
        {"stream": 8, "free": 6, "end": 8},
        ["free", "end"],
        {"shortcut that meets": ["stream"]},
    ),
    "stem": (
        Inverted,
        "keep",
        {"stem": 8, "stream": 6, "free": 10},
        ["free"],
        {ADDS: ["stream"], "the stem": ["stem"]},
    ),
    "stem, coupled": (
        Inverted,
        "couple",
        {"stem": 8, "stream": 6, "free": 10},
        ["free", "stream"],
        {"the stem": ["stem"]},
    ),
}


def count(build, widths):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(**widths).eval()(X)
    return counter.get_total_flops() // 2


def without(build, widths, gone):
    """MACs with these widths at 0."""
    if not gone:
        return count(build, widths)
    first, *rest = gone
    half = {**widths, first: widths[first] // 2}
    return 2 * without(build, half, rest) - without(build, widths, rest)


@pytest.mark.parametrize("name", CASES)
def test_the_macs_that_a_reason_keeps_are_those_that_would_go(name):
    build, residual, widths, free, kept = CASES[name]
    scales = pf.scaling_factors(build(**widths), X, residual=residual)
    full, least = count(build, widths), without(build, widths, free)
    found = dict(scales.pinned_macs)
    assert found.pop(WITH_THE_LAYER_BEFORE, 0.0) == 0.0
    assert len(found) == len(kept)
    for why, gone in kept.items():
        (reason,) = [each for each in found if why in each]
        wanted = (least - without(build, widths, [*free, *gone])) / full
        assert wanted > 0.01 and found[reason] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5, 6])
def test_the_dearest_come_first(seed, residual):
    scales = pf.scaling_factors(Program(seed), torch.rand(2, 3, 16, 16), residual=residual)
    costs = scales.pinned_macs
    assert set(costs) == set(scales.pinned.values())
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    order = [list(costs).index(reason) for reason in scales.pinned.values()]
    assert order == sorted(order)
    assert all(0.0 <= share <= 1.0 for share in costs.values())


def test_what_is_pinned_is_free_once_the_code_follows_the_shape():
    """The share is what the largest possible cut gains, but for the last channel of a layer."""

    class Follows(Split):
        def forward(self, x):
            one, two = self.a(x).chunk(2, 1)
            return self.c(torch.cat([self.b(one), two], 1))

    reach = []
    for build in (Split, Follows):
        model = build(first=128, free=96)
        scales = pf.scaling_factors(model, X)
        reach.append(pf.reachable(model, X, scales).macs[1])
    (share,) = [
        share
        for reason, share in pf.scaling_factors(Split(128, 96), X).pinned_macs.items()
        if "constant" in reason
    ]
    assert reach[1] - reach[0] == pytest.approx(share, abs=0.02) and share > 0.1


def test_a_user_reads_it_everywhere():
    model = Block(8, 6)
    scales = pf.scaling_factors(model, X)
    (share,) = scales.pinned_macs.values()
    said = f"takes no part, which keeps {share:.1%} of the MACs: stem.1.weight, two.1.weight: its"
    assert said in repr(scales)
    assert scales.select("one").pinned_macs == scales.pinned_macs
    assert scales.rebind(model).pinned_macs == scales.pinned_macs
    plan = pf.plan(model, X, scales, "fixed", value=0.0)
    assert plan.pinned_macs == scales.pinned_macs and said in str(plan)
    assert pf.PruningPlan.from_json(plan.to_json()).pinned_macs == plan.pinned_macs
    with pytest.raises(pf.PlanError, match=rf"; {share:.1%} of the MACs stay for: its channels"):
        pf.plan(model, X, scales, cut=0.99)
    assert set(pf.add_gates(model, X).pinned_macs.values()) == {share}
