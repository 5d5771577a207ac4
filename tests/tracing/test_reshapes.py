"""Channels taken apart by the network's code: chunks, slices, reshapes, shuffles, groups."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.hard_nets import Net, body, tail
from support.masked import TOLERANCE, error, masked
from support.nets import X, conv_bn, prepared
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf
from polarfast.tracing.sizes import Size


def net(forward, **modules) -> Net:
    return Net(forward, **{"a": body(3, 16), "end": nn.Sequential(*tail(16)), **modules})


def c2f(n, x):
    first, second = n.a(x).chunk(2, 1)
    third = n.b(second)
    return n.end(torch.cat([first, second, third, n.c(third)], 1))


def shuffled(n, x):
    x = n.a(x)
    b, c, h, w = x.size()
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
    return n.end(n.b(x))


def unit(n, x):
    """A unit of ShuffleNetV2."""
    one, two = n.a(x).chunk(2, dim=1)
    x = torch.cat((one, n.b(two)), dim=1)
    b, c, h, w = x.shape
    x = torch.transpose(x.view(b, 2, c // 2, h, w), 1, 2).reshape(b, -1, h, w)
    return n.end(x)


def quarters(n, x):
    x = n.a(x)
    c = x.shape[1]
    left, right = torch.split(x, [c // 4, c - c // 4], 1)
    return n.end(torch.cat([n.b(right), left], 1))


def slices(n, x):
    x = n.a(x)
    half = x.size(1) // 2
    return n.end(torch.cat([n.b(x[:, :half, 1:-1]), n.b(x[:, -half:, 1:-1])], 1))


def narrowed(n, x):
    x = n.a(x)
    third = x.shape[1] // 4
    return n.end(n.b(x.narrow(1, third, 2 * third)))


def excite(n, x):
    """Squeeze-excite with views, as in many networks."""
    x = n.a(x)
    b, c = x.shape[:2]
    y = n.fc(x.mean((2, 3)).view(b, c)).sigmoid().view(b, c, 1, 1)
    return n.end(x * y)


def counted(n, x):
    x = F.adaptive_avg_pool2d(n.a(x), 2)
    return n.fc(x.reshape(x.shape[0], x.numel() // x.shape[0]))


def flat(n, x):
    x = F.adaptive_avg_pool2d(n.a(x), 2)
    return n.fc(x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)))


def interleaved(n, x):
    return n.end(torch.stack(n.a(x).chunk(2, 1), 2).flatten(1, 2))


def side_by_side(n, x):
    """Two layers' channels along the height, then flattened."""
    x = n.a(x)
    pools = [F.adaptive_avg_pool2d(n.b(x), 1), F.adaptive_avg_pool2d(x, (2, 1))]
    return n.fc(torch.cat(pools, 2).flatten(1))


def nothing(n, x):
    """Reshapes and a sum of what holds no element, as where a detector finds nothing."""
    x = n.a(x)
    tokens = x.permute(0, 2, 3, 1)[:, :0].reshape(0, x.shape[1])
    return n.end(x) + x[:, :0].reshape(0, 10, 10).sum() + 0 * tokens.numel()


def picked(n, x):
    """Rows picked by masks and places that the network computes, as detectors do."""
    x = n.a(x)
    scores = n.fc(n.b(x).mean((2, 3)))
    best = scores[torch.arange(len(scores)), scores.argmax(1)]
    return n.end(x) + scores[scores > 0].sum() + best[scores[:, 0] > scores[:, 1]].sum()


NETS = {
    "chunks that are read and concatenated": lambda: net(
        c2f, b=body(8, 8), c=body(8, 8), end=nn.Sequential(*conv_bn(32, 6), *tail(6))
    ),
    "channel shuffle": lambda: net(shuffled, b=nn.Sequential(*conv_bn(16, 16, groups=4))),
    "a unit of ShuffleNet": lambda: net(unit, b=body(8, 8)),
    "split into a quarter and the rest": lambda: net(
        quarters, b=body(12, 8), end=nn.Sequential(*tail(12))
    ),
    "slices": lambda: net(slices, b=body(8, 8)),
    "narrow": lambda: net(narrowed, b=body(8, 16)),
    "unflatten": lambda: net(
        lambda n, x: n.end(n.a(x).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2))
    ),
    "nn.ChannelShuffle": lambda: net(
        lambda n, x: n.end(n.b(n.shuffle(n.a(x)))), shuffle=nn.ChannelShuffle(4), b=body(16, 16)
    ),
    "pixel shuffle": lambda: net(
        lambda n, x: n.end(n.b(F.pixel_shuffle(n.a(x), 2))), b=body(4, 16)
    ),
    "pixel unshuffle": lambda: net(
        lambda n, x: n.end(n.b(F.pixel_unshuffle(n.a(x), 2))), b=body(64, 16)
    ),
    "numel": lambda: net(counted, fc=nn.Linear(64, 3)),
    "a product of sizes": lambda: net(flat, fc=nn.Linear(64, 3)),
    "interleaved chunks": lambda: net(interleaved),
    "side by side": lambda: net(side_by_side, b=body(16, 16), fc=nn.Linear(48, 3)),
    "picked places": lambda: net(picked, b=body(16, 8), fc=nn.Linear(8, 4)),
    "reshapes of nothing": lambda: net(nothing),
    "groups": lambda: net(
        lambda n, x: n.end(n.c(n.b(n.a(x)))),
        b=nn.Sequential(*conv_bn(16, 32, groups=4), nn.SiLU()), c=body(32, 16),
    ),
    "groups of a transposed convolution": lambda: net(
        lambda n, x: n.end(n.c(n.b(n.a(x)))),
        b=nn.Sequential(nn.ConvTranspose2d(16, 32, 2, 2, groups=4), nn.BatchNorm2d(32), nn.ReLU()),
        c=body(32, 16),
    ),
    "groups of groups": lambda: net(
        lambda n, x: n.end(n.c(n.b(n.a(x)))),
        b=nn.Sequential(*conv_bn(16, 24, groups=2), nn.Sigmoid()),
        c=nn.Sequential(*conv_bn(24, 16, groups=8), nn.ReLU()),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "none"])
@pytest.mark.parametrize("name", NETS)
def test_slim_equals_the_masked_network(name, fold):
    model, scales = prepared(NETS[name])
    assert "a.1.weight" in scales
    if "huffle" in name and "pixel" not in name:  # the same place in each group goes together
        with torch.no_grad():
            for gamma in scales.values():
                gamma.copy_(torch.tensor([1.0, 0] * (gamma.numel() // 2)))
    plan = pf.plan(model, X, scales, "fixed", fold=fold)
    # There, a constant channel would be as wide as what it stands for.
    assert plan.kept["a.1.weight"].numel() < 16 or (name, fold) == ("channel shuffle", "exact")
    slim = pf.slim(model, plan)
    # Four channels with constants of their own become one that alternates from place to place.
    uneven = name == "pixel shuffle" and fold == "exact"
    assert bool(plan.inexact) == uneven
    assert (error(masked(model, plan, fold == "none"), slim) < TOLERANCE) != uneven
    with FlopCounterMode(display=False) as counter:
        slim(X)
    assert plan.macs == counter.get_total_flops() // 2
    assert plan.params == sum(param.numel() for param in slim.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_groups_lose_as_many_channels_each_but_not_the_same(optimizer):
    model, scales = prepared(NETS["groups"])
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trained = optimizer(model.parameters(), lr=0.0, **settings)
    model(X).sum().backward()
    trained.step()
    with torch.no_grad():  # of 4, a group of 4 each: 2, 2, 3 and 2 stay
        scales["a.1.weight"].copy_(torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1]))
        scales["b.1.weight"].fill_(1)
    plan = pf.plan(model, X, scales, "fixed", fold="none")
    kept = [[i - 4 * g for i in plan.kept["a.1.weight"].tolist() if i // 4 == g] for g in range(4)]
    assert [len(places) for places in kept] == [3, 3, 3, 3]
    assert {0, 1} < set(kept[0]) and {2, 3} < set(kept[1]) and kept[2] == [0, 2, 3]
    assert plan.layers["a.1.weight"].note == "3 added back (equal groups or chunks)"
    state = trained.state[model.b[0].weight]
    name = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
    before, weight = state[name].clone(), model.b[0].weight
    slim = pf.slim(model, plan, optimizer=trained)
    for group, places in enumerate(kept):
        rows = slice(8 * group, 8 * group + 8)
        assert torch.equal(slim.b[0].weight[rows], weight[rows][:, places])
        moved = trained.state[slim.b[0].weight][name]
        assert torch.equal(moved[rows], before[rows][:, places])


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("a number in the code", lambda n, x: x.view(x.shape[0], 2, 8, 10, 10)),
        ("both numbers", lambda n, x: x.reshape(3, 2, 8, 10, 10).flatten(1, 2)),
        ("a size of another layer", lambda n, x: x.view(3, 2, n.c // 2, 10, 10)),
        ("a size computed in another way", lambda n, x: x.view(3, int(x.shape[1] / 2), 2, 10, 10)),
        ("chunks of unequal size", lambda n, x: x.chunk(3, 1)[0]),
        ("chunks of constant size", lambda n, x: x.chunk(x.shape[1] // 4, 1)[0]),
        ("constant slice", lambda n, x: x[:, :8]),
        ("slice by the image's size", lambda n, x: x[:, : x.shape[2]]),
        ("constant split", lambda n, x: x.split((4, 12), 1)[1]),
        ("split by a rest", lambda n, x: x.split([4, x.shape[1] - 4], 1)[1]),
        ("every second channel", lambda n, x: x[:, ::2]),
        ("flattened by a number", lambda n, x: x.view(-1, 1600)),
    ],
)  # fmt: skip
def test_what_does_not_follow_the_channels_is_pinned(name, forward):
    model = Net(
        lambda n, x: (forward(n, n.a(x)), n.end(n.free(x)).softmax(0))[1]
        + forward(n, n.a(x)).mean(),
        a=body(3, 16), free=body(3, 8), end=nn.Sequential(*tail(8)),
    )  # fmt: skip
    model.c = 16
    scales = pf.scaling_factors(model, X.float())
    assert list(scales) == ["free.1.weight"]
    assert (
        "fixed" in scales.pinned["a.1.weight"]
        or "constant" in scales.pinned["a.1.weight"]
        or ("do not follow" in scales.pinned["a.1.weight"])
    )


def test_a_size_of_other_channels_only_counts_where_they_go_together():
    def forward(n, x):
        one, two = n.a(x), n.b(x)
        return n.end(one.view(one.shape[0], two.shape[1], 10, 10)) + n.tail(two)

    model = net(forward, b=body(3, 16), tail=nn.Sequential(*tail(16)), free=body())
    with pytest.raises(pf.TracingError, match="fixed in the network's code"):
        pf.scaling_factors(model, X.float())


def test_sizes_are_plain_numbers_when_they_leave():
    seen = []

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.end = body(), nn.Sequential(*tail(8))

        def forward(self, x):
            x = self.a(x)
            self.shape, self.half = x.shape, x.shape[1] // 2
            seen.append(x.shape[1])
            return self.end(x)

    model = Keeps()
    pf.scaling_factors(model, X.float())
    assert isinstance(seen[0], Size) and model.half == 4
    assert type(copy.deepcopy(model).half) is int
    assert [type(size) for size in pickle.loads(pickle.dumps(model.shape))] == [int] * 4


def test_sizes_that_are_kept_count_as_fixed_in_the_next_trace():
    def kept(n, x):
        x = n.a(x)
        n.shape = n.shape or x.shape
        c = n.shape[1]
        return n.end(n.free(x.view(-1, 2, c // 2, 10, 10).flatten(1, 2)))

    model = net(kept, free=body(16, 16))
    model.shape = None
    assert list(pf.scaling_factors(model, X.float())) == ["a.1.weight", "free.1.weight"]
    scales = pf.scaling_factors(model, X.float())
    assert list(scales) == ["free.1.weight"] and "do not follow" in scales.pinned["a.1.weight"]
