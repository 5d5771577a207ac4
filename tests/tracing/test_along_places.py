"""Operators that work along the places of each channel, and code that makes tensors by a size it
asked for: the layer before is pruned, and what comes out is exact.
"""

import pytest
import torch
import torch.nn.functional as F
from support.masked import TOLERANCE, error, masked
from support.nets import settle, zero
from torch import nn

import polarfast as pf

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block(c_in, c_out, kernel=3):
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def grid(x):
    """Where to sample, turned by a little."""
    angle = torch.tensor([[0.9, 0.3, 0.1], [-0.3, 0.9, 0.0]], dtype=x.dtype)
    return F.affine_grid(angle.expand(x.shape[0], 2, 3), [x.shape[0], 1, 6, 6], align_corners=False)


def gathered(x):
    places = torch.ones(x.shape[0], x.shape[1], 4, dtype=torch.long)
    return x.flatten(2).gather(2, places).unsqueeze(-1)


class Attention(nn.Module):
    """One mask for all channels, brought to their number; and their values where it is highest."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = block(3, 16), block(16, 8, 1), nn.Conv2d(8, 3, 1)
        self.mask = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        mask = self.mask(x).sigmoid()
        x = self.a(x)
        best = mask.flatten(2).topk(5)[1].expand(-1, x.shape[1], -1)
        x = x * mask.expand_as(x).contiguous() * mask.repeat(1, x.shape[1], 1, 1)
        return self.out(self.b(x.flatten(2).gather(2, best).unsqueeze(-1)))


def test_what_is_repeated_by_the_number_of_channels():
    model = settle(Attention(), X)
    scales = pf.scaling_factors(model, X.double())
    zero(scales)
    plan = pf.plan(model, X.double(), scales, "fixed", value=0.0, fold="none")
    assert len(plan.kept["a.1.weight"]) < 16
    slim = pf.slim(model, plan)
    assert error(masked(model, plan, zero_beta=True), slim, (3, 8, 8)) < TOLERANCE


def unpooled(x):
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, places, 2)


def shifted(x):
    """A temporal shift: some channels come from the image after, some from that before."""
    out, fold = torch.zeros_like(x), x.shape[1] // 4
    out[:-1, :fold] = x[1:, :fold]
    out[1:, fold : 2 * fold] = x[:-1, fold : 2 * fold]
    out[:, 2 * fold :] = x[:, 2 * fold :]
    return out


def in_place(x):
    y = x - 0.1
    y.abs_()
    F.threshold_(y, 0.05, 0.01)
    return y.masked_fill_(y > 0.5, 0.25)


def spread_and_center(x):
    variance, mean = torch.var_mean(x, (2, 3), keepdim=True)
    low, high = x.flatten(2).aminmax(dim=2)
    return (x - mean) / (variance + 1) + spaced(low - high)


def parts(x):
    pairs = torch.view_as_real(torch.complex(x, torch.fft.ifft(x).real))
    return torch.view_as_complex(pairs).imag + pairs.sum(-1)


def spaced(x):
    """Back to four dimensions."""
    return x[..., None, None]


OPERATORS = {
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "max over places": lambda x: spaced(torch.max(x.flatten(2), 2)[0]),
    "min, kept": lambda x: x.min(3, keepdim=True)[0],
    "maxout": lambda x: torch.max(torch.stack((x, -x), -1), -1)[0],
    "grid_sample": lambda x: F.grid_sample(x, grid(x), align_corners=False),
    "gather": gathered,
    "glu": lambda x: torch.cat([F.glu(x, 1)] * 2, 1),
    "glu over places": lambda x: F.glu(x, 3),
    "spectrum": lambda x: torch.fft.rfft2(x).abs(),
    "there and back": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(8, 8)),
    "cumsum": lambda x: x.cumsum(2),
    "cummax": lambda x: x.cummax(2)[0],
    "softmax": lambda x: x.flatten(2).softmax(2).unflatten(2, x.shape[2:]),
    "log_softmax": lambda x: x.log_softmax(3),
    "patches": lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2),
    "lp pool": lambda x: F.lp_pool2d(x, 2, 2),
    "median": lambda x: spaced(x.flatten(2).median(2)[0]),
    "kthvalue": lambda x: spaced(x.flatten(2).kthvalue(3, 2)[0]),
    "topk": lambda x: x.flatten(2).topk(3, 2)[0].unsqueeze(-1),
    "norm": lambda x: spaced(x.flatten(2).norm(dim=2)),
    "sort": lambda x: x.flatten(2).sort(2, descending=True)[0].unflatten(2, x.shape[2:]),
    "weighted stack": lambda x: (torch.stack((x, x.relu()), -1) * torch.tensor([0.3, 0.7])).sum(-1),
    "unpooling": unpooled,
    "shift in place": shifted,
    "in place": in_place,
    "variance, lowest and highest": spread_and_center,
    "product and any": lambda x: spaced((x + 0.5).flatten(2).prod(2) * (x > 0.7).flatten(2).any(2)),
    "rotated": lambda x: x.rot90(1, (2, 3)),
    "complex and its parts": parts,
    "logsigmoid": F.logsigmoid,
    "activations before, subtracted": lambda x: torch.rsub(x.relu(), x),
    "as another": lambda x: x.flatten(2).view_as(x),
    "expanded like another": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
    "a new tensor beside": lambda x: torch.cat([x, x.new_zeros(*x.shape[:2], 1, 8)], 2),
}


class Through(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.a, self.b, self.out = block(3, 16), block(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.out(self.b(self.operator(self.a(x))))


def check(model, first, x=X):
    """Half of all channels go, and the slim model equals the original with γ = 0 there."""
    settle(model, x)
    x = x.double()
    scales = pf.scaling_factors(model, x)
    assert first in scales, scales.pinned.get(first)
    zero(scales)
    plan = pf.plan(model, x, scales, "fixed", value=0.0)
    assert len(plan.kept[first]) < scales[first].numel()
    slim = pf.slim(model, plan)
    with torch.no_grad():
        if not plan.inexact:
            for images in (x, torch.randn_like(x)):
                torch.testing.assert_close(slim(images), model(images), rtol=1e-8, atol=1e-8)
    return plan


@pytest.mark.parametrize("name", OPERATORS)
def test_each_channel_for_itself(name):
    plan = check(Through(OPERATORS[name]), "a.1.weight")
    assert not plan.inexact


def test_the_indices_of_pooling_are_channels_too():
    def both(x):
        y, places = F.max_pool2d(x, 2, return_indices=True)
        return torch.cat([y, places / 64], 2)

    check(Through(both), "a.1.weight")


def test_below_each_other_then_beside():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.b = block(3, 16), block(3, 16), block(32, 8, 1)
            self.out = nn.Conv2d(8, 3, 1)

        def forward(self, x):
            one, two = self.a(x), self.c(x)
            below = torch.cat([one, two], 2)
            return self.out(self.b(torch.cat([below, below.sin()], 1)))

    plan = check(Joined(), "a.1.weight")
    assert plan.kept["a.1.weight"].equal(plan.kept["c.1.weight"])


def test_along_the_channels_it_pins():
    operators = (
        lambda x: x.softmax(1),
        lambda x: x.sort(1)[0],
        lambda x: x.cumsum(1),
        lambda x: x / (x.max() + 1),  # over everything
        lambda x: x - x.flatten(1).median(),
    )
    for operator in operators:
        scales = pf.scaling_factors(Through(operator), X)
        assert "a.1.weight" in scales.pinned and "b.1.weight" in scales


def test_what_draws_numbers_for_each_channel_pins():
    """With fewer channels, each would be given other numbers."""
    pool = Through(lambda x: F.fractional_max_pool2d(x, 2, output_size=4))
    scales = pf.scaling_factors(pool, X)
    assert "draws random numbers for each channel" in scales.pinned["a.1.weight"]
    assert "b.1.weight" in scales


class Beside(nn.Module):
    """Zeros by the sizes of an activation, joined to it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = block(3, 16), block(32, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.shape
        return self.out(self.b(torch.cat([x, torch.zeros(n, c, h, w, dtype=x.dtype)], 1)))


def test_a_new_tensor_follows_the_size_that_it_was_made_by():
    plan = check(Beside(), "a.1.weight")
    assert not plan.inexact


class Light(nn.Module):
    """OSNet's: a pointwise and a depthwise convolution, and one norm behind both."""

    def __init__(self, beside=False):
        super().__init__()
        self.a, self.beside = block(3, 16), beside
        self.point = nn.Conv2d(16, 24, 1, bias=False)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.norm, self.out = nn.BatchNorm2d(24), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        x = self.point(self.a(x))
        out = self.out(F.relu(self.norm(self.depth(x))))
        return out + self.out(x) if self.beside else out


def test_a_norm_behind_a_pointwise_and_a_depthwise_convolution():
    plan = check(Light(), "norm.weight")
    assert not plan.inexact
    scales = pf.scaling_factors(Light(beside=True), X)
    assert "read by others too" in scales.pinned["norm.weight"]


class Recurrent(nn.Module):
    def __init__(self, kind, bidirectional=False):
        super().__init__()
        self.cnn = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 12), nn.MaxPool2d(2))
        self.rnn = kind(24, 16, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(32 if bidirectional else 16, 5)

    def forward(self, x):
        return self.fc(self.rnn(self.cnn(x).permute(0, 3, 1, 2).flatten(2))[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_what_a_recurrent_layer_reads_is_cut(kind, bidirectional, tmp_path):
    def build():
        return Recurrent(kind, bidirectional)

    model = build()
    plan = check(model, "cnn.2.1.weight")
    assert not plan.inexact
    slim = pf.slim(model, plan)
    constant = len(plan.layers["cnn.2.1.weight"].constant)
    assert slim.rnn.input_size == 2 * (len(plan.kept["cnn.2.1.weight"]) + constant) < 24
    assert slim.rnn.hidden_size == 16
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", build)
    with torch.no_grad():
        torch.testing.assert_close(loaded.double().eval()(X.double()), slim(X.double()))
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    slim.train()(X.double()).sum().backward()
    optimizer.step()
    single = Recurrent(kind, bidirectional).float()
    assert "cnn.2.1.weight" in pf.scaling_factors(single, X)


def test_nothing_to_trace_with():
    with pytest.raises(pf.TracingError, match="no element"):
        pf.scaling_factors(Light(), X[:0])
    with torch.device("meta"):
        model = Light()
    with pytest.raises(pf.TracingError, match="meta device"):
        pf.scaling_factors(model, X)


class Domains(nn.Module):
    """A norm for each domain behind one convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = block(3, 8), nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x, domain=0):
        return self.out(F.relu(self.norms[domain](self.conv(self.stem(x)))))


class Levels(Domains):
    """A head on two levels of a pyramid: shared convolutions, norms of their own."""

    def forward(self, x):
        x = self.stem(x)
        levels = zip(self.norms, (x, F.max_pool2d(x, 2)), strict=True)
        heads = [self.out(F.relu(norm(self.conv(level)))).mean((2, 3)) for norm, level in levels]
        return torch.cat(heads, 1)


@pytest.mark.parametrize("net", [Domains, Levels])
def test_norms_beside_each_other_go_together(net):
    """A channel goes where the γ of all are 0."""
    torch.manual_seed(0)
    model = settle(net(), X)
    x = X.double()
    examples = [(x, 0), (x, 1)] if net is Domains else [(x,)]
    scales = pf.scaling_factors(model, examples)
    first, second = "norms.0.weight", "norms.1.weight"
    assert {first, second} <= set(scales)
    with torch.no_grad():
        scales[first][:8] = 0
        scales[second][4:12] = 0
    plan = pf.plan(model, examples, scales, "fixed", value=0.0)
    kept = [0, 1, 2, 3, *range(8, 16)]
    assert plan.kept[first].tolist() == plan.kept[second].tolist() == kept
    # One bias cannot take up what differs between the two.
    assert "shares out.bias" in plan.inexact["out.weight"]
    with torch.no_grad():
        for norm in model.norms:
            norm.bias[4:8] = 0
    plan = pf.plan(model, examples, scales, "fixed", value=0.0)
    assert not plan.inexact
    slim = pf.slim(model, plan)
    with torch.no_grad():
        for inputs in examples:
            torch.testing.assert_close(slim(*inputs), model(*inputs), rtol=1e-8, atol=1e-8)


def test_numbers_of_numpy_are_no_sizes():
    np = pytest.importorskip("numpy")

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = block(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x) * torch.as_tensor(np.array(2.0), dtype=x.dtype)
            return self.fc(x[:, :, np.array(0)].mean(2))

    assert list(pf.scaling_factors(Scaled(), X)) == ["a.1.weight"]


@pytest.mark.parametrize("operator", [torch.add, torch.mul])
def test_what_is_written_into_a_tensor_of_the_networks_own_pins(operator):
    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fc = block(3, 8), block(3, 8), block(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            buffer = torch.empty_like(a)
            operator(a, b, out=buffer)
            return self.fc(self.c(buffer).mean((2, 3)))

    model = Out().eval()
    with torch.no_grad():
        before = model(X)
        scales = pf.scaling_factors(model, X, residual="couple")
        assert torch.equal(model(X), before)
    assert list(scales) == ["c.1.weight"] and "flows through" in scales.pinned["a.1.weight"]
