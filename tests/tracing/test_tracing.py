"""The dry run: what it finds, what it refuses, and that it leaves the model as found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import Bottlenecks, Branches, Grouped, Residual, SqueezeExcite, chain, conv_bn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf
from polarfast.tracing.classes import Channels
from polarfast.tracing.dryrun import trace
from polarfast.tracing.graph import components

NETS = [chain, Residual, Bottlenecks, Branches, Grouped, SqueezeExcite]
X = torch.randn(2, 3, 10, 10)


@pytest.mark.parametrize("build", NETS)
def test_macs_are_those_of_the_flop_counter(build):
    model = build().eval()
    graph = trace(model, X)
    macs = sum(c.macs(c.inputs.numel(), c.outputs.numel()) for c in graph.projections)
    with FlopCounterMode(display=False) as counter:
        model(X)
    assert macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_found(training):
    model = Residual().train(training)
    model.first.eval()
    model(X).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    pf.scaling_factors(model, X, residual="expand")
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(param.grad, grads[name]) for name, param in model.named_parameters())


def test_layers_that_run_in_train_mode_only_are_traced_and_buffers_put_back():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
            self.aux, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor):
            x = self.body(x)
            out = self.fc(x.mean((2, 3)))
            return (out, self.aux(x)) if self.training else out

    model = Auxiliary().eval()
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, X)
    assert ("aux.weight", 1) in graph.axes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("softmax", lambda x: x.softmax(1)),
        ("cumsum", lambda x: x.cumsum(1)),
        ("split", lambda x: torch.cat(x.split(4, 1)[::-1], 1)),
        ("slice", lambda x: torch.cat([x[:, 4:], x[:, :4]], 1)),
        ("shuffle", lambda x: x.view(2, 2, 4, 10, 10).transpose(1, 2).reshape(2, 8, 10, 10)),
        ("mean over channels", lambda x: x - x.mean(1, keepdim=True)),
        ("constant of a fixed size", lambda x: x + torch.ones(8, 1, 1)),
        ("sort", lambda x: x.sort(1).values),
        ("matmul", lambda x: x + (x.flatten(2) @ x.flatten(2).mT).sum((1, 2)).view(2, 1, 1, 1)),
        ("written into a buffer", lambda x: torch.zeros(2, 8, 10, 10).copy_(x)),
    ],
)
def test_channels_that_meet_what_the_tracer_cannot_follow_are_pinned(name, forward):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(*conv_bn(3, 8))
            self.free = nn.Sequential(*conv_bn(8, 8))
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = forward(self.before(x))
            return self.fc(F.relu(self.free(x)).mean((2, 3)))

    scales = pf.scaling_factors(Net(), X)
    assert list(scales) == ["free.1.weight"]
    assert scales.pinned["before.1.weight"]


def test_structured_inputs_and_outputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(*conv_bn(3, 8)), nn.Conv2d(8, 2, 1)

        def forward(self, image: Tensor, scale: float, extra: dict | None = None):
            x = self.body(image) * scale
            return {"logits": self.head(F.relu(x)), "none": None, "more": [(extra, 1)]}

    scales = pf.scaling_factors(Net(), {"image": X, "scale": 2.0, "extra": None})
    assert list(scales) == ["body.1.weight"]
    assert list(pf.scaling_factors(Net(), (X, 2.0))) == ["body.1.weight"]


def test_errors_say_what_to_do():
    with pytest.raises(pf.TracingError, match="scripted"):
        pf.scaling_factors(torch.jit.script(chain()), X)
    with pytest.raises(pf.TracingError, match="forward failed in eval mode.*example_inputs"):
        pf.scaling_factors(chain(), torch.randn(2, 4, 10, 10))
    with pytest.raises(pf.TracingError, match="no tensor"):
        trace(_Nothing(), X)
    with pytest.raises(pf.TracingError, match="gates"):
        pf.scaling_factors(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), X)
    with pytest.raises(pf.ArgumentError, match="residual='all'"):
        pf.scaling_factors(chain(), X, residual="all")


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


def test_components_of_random_graphs():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 40, 300):
        edges = torch.randint(0, n, (2, n // 2), generator=generator)
        label = components(n, edges)
        expected = list(range(n))
        for _ in range(n):  # Bellman-Ford, slow and plain
            for a, b in edges.t().tolist():
                expected[a] = expected[b] = min(expected[a], expected[b])
        assert label.tolist() == expected


@pytest.mark.slow
def test_wrapped_models_are_looked_through():
    model = chain()
    names = list(pf.scaling_factors(model, X))
    assert list(pf.scaling_factors(nn.DataParallel(model), X)) == names
    assert list(pf.scaling_factors(torch.compile(model), X)) == names


def test_shared_modules_are_one_layer():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
            self.shared = nn.Sequential(*conv_bn(8, 8), nn.ReLU())
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.shared(self.shared(self.stem(x))).mean((2, 3)))

    graph = trace(Twice(), X)
    layers = Channels(graph, "keep", lambda name: True, lambda name: False).layers
    # What the shared convolution reads the second time is what it wrote the first time.
    assert torch.equal(layers["stem.1.weight"], layers["shared.1.weight"])


class _Head(nn.Module):
    """An auxiliary head that runs in train mode, on images of 20 pixels or more."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.head = nn.Sequential(nn.AvgPool2d(4, 4), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
        self.last, self.fc = nn.Conv2d(6, 4, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor):
        x = self.body(x)
        out = self.fc(x.mean((2, 3)))
        return (out, self.last(self.head(x)).mean((2, 3))) if self.training else out


@pytest.mark.parametrize("size", [10, 20])
def test_heads_that_run_in_train_mode_need_no_larger_example_inputs(size):
    x = torch.randn(1, 3, size, size)
    scales = pf.scaling_factors(_Head(), x)
    assert list(scales) == ["body.1.weight", "head.2.weight"]
    graph = trace(_Head(), x)
    assert sum(call.counted for call in graph.projections) == 2
    assert [call.weight for call in graph.projections].count("head.1.weight") == 1


def test_what_runs_in_no_size_is_refused_with_the_first_error():
    class Broken(_Head):
        def forward(self, x: Tensor):
            return self.last(x) if self.training else self.fc(self.body(x).mean((2, 3)))

    with pytest.raises(pf.TracingError, match="in train mode.*\\[4, 6, 5, 5\\].*[0-9], 3, 10, 10"):
        pf.scaling_factors(Broken(), torch.randn(1, 3, 10, 10))
