"""Small networks in which other pruners, and earlier versions of this one, went wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import conv_bn, settle, zero
from test_slimming import TOLERANCE, error, masked
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf

X = torch.randn(3, 3, 10, 10, dtype=torch.float64)


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


def make(build):
    torch.manual_seed(0)
    model = settle(build(), torch.rand(4, 3, 10, 10))
    scales = pf.scaling_factors(model, X)
    zero(scales)
    return model, scales


@pytest.mark.parametrize("fold", ["exact", "none"])
@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_slim_is_what_the_plan_says(name, fold):
    model, scales = make({**EXACT, **INEXACT}[name])
    plan = pf.plan(model, X, scales, "fixed", fold=fold)
    slim = pf.slim(model, plan)  # raises if it is not what the plan says
    assert plan.inexact == slim.polarfast_info.inexact == pf.verify(model, slim, plan, X).notes
    assert bool(plan.inexact) == (name in INEXACT and fold == "exact")
    if not plan.inexact:
        assert error(masked(model, plan, fold == "none"), slim) < TOLERANCE
    for candidate, macs in ((model, plan.macs_before), (slim, plan.macs)):
        with FlopCounterMode(display=False) as counter:
            candidate(X.clone())
        assert macs == counter.get_total_flops() // 2
    assert plan.params == sum(param.numel() for param in slim.parameters())


def test_one_inexact_reader_hides_nothing(monkeypatch):
    """The check compares with what was claimed for it, and everything else must be equal."""
    from polarfast import slimming

    model, scales = make(INEXACT["squeeze-excite behind an exact reader"])
    plan = pf.plan(model, X, scales, "fixed")
    write = slimming.write_edits

    def wrong(*args):
        edits = write(*args)
        edits.tensors["a.7.running_mean"] = model.get_buffer("a.7.running_mean") + 0.01
        return edits

    monkeypatch.setattr(slimming, "write_edits", wrong)
    with pytest.raises(pf.VerificationError, match="not what the plan says"):
        pf.slim(model, plan)


def test_inputs_and_ambient_modes_are_left_alone():
    model, scales = make(EXACT["input changed in place"])
    x = X.clone()
    pf.slim(model, pf.plan(model, x, scales, "fixed"))
    assert torch.equal(x, X)
    model = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *tail(8))
    names = list(pf.scaling_factors(model, X.float()))
    with torch.inference_mode():
        assert list(pf.scaling_factors(model, X.float())) == names
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert list(pf.scaling_factors(model, X.float())) == names


def test_buffers_that_forward_replaces_are_put_back():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.end = body(), nn.Sequential(*tail(8))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.end(self.a(x))

    model = Counting()
    before = model.calls
    pf.scaling_factors(model, X.float())
    assert model.calls is before and float(before) == 0


def test_outputs_in_objects_are_outputs():
    class Out:
        def __init__(self, features: Tensor) -> None:
            self.features = features

    def forward(net, x):
        features = net.a(x)
        return net.end(net.free(features)), Out(features)

    net = Net(forward, a=body(), free=body(8, 6), end=nn.Sequential(*tail(6)))
    scales = pf.scaling_factors(net, X.float())
    assert list(scales) == ["free.1.weight"]
    assert "output of the network" in scales.pinned["a.1.weight"]


def test_files_hold_buffers_outside_the_state_dict(tmp_path):
    model, scales = make(Scaled)
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", lambda: Scaled().double().eval())
    assert torch.equal(loaded(X), slim(X))


def test_slim_models_can_be_slimmed_again(tmp_path):
    model = settle(nn.Sequential(*conv_bn(3, 16), nn.ReLU(), *conv_bn(16, 8), *tail(8)), X)
    first = pf.scaling_factors(model, X, residual="expand")
    zero(first)
    slim = pf.slim(model, pf.plan(model, X, first, "fixed"))
    again = pf.scaling_factors(slim, X, residual="expand")
    zero(again, seed=5)
    plan = pf.plan(slim, X, again, "fixed")
    small = pf.slim(slim, plan)
    assert plan.params < plan.params_before
    pf.save(small, plan, tmp_path / "small.pt")
    original = copy.deepcopy(model)
    loaded = pf.load(tmp_path / "small.pt", lambda: original)
    assert torch.equal(loaded(X), small(X))


def test_adam_with_a_parameter_of_one_element_and_named_groups():
    net = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *tail(8)[:2], nn.Linear(8, 1, bias=False))
    model = settle(net, X)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-6)
    model(X).sum().backward()
    optimizer.step()
    scales = pf.scaling_factors(model, X)
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X, scales, "fixed"), optimizer=optimizer)
    group = optimizer.param_groups[0]
    assert slim[5].bias is not None and len(group["params"]) == len(group["param_names"])


def test_layers_left_out_by_the_user_are_left_alone():
    from nets import Residual, empty

    model = settle(Residual(), X)
    scales = pf.scaling_factors(model, X, residual="expand")
    chosen = scales.select("first.4")
    empty(chosen, ["first.4.weight"])
    plan = pf.plan(model, X, chosen)
    slim = pf.slim(model, plan)
    assert slim.first[0].out_channels == 6 and plan.kept["first.4.weight"].numel() == 0


def test_a_network_with_a_dtype_of_its_own_is_told_what_to_do():
    net = Net(lambda n, x: n.end(n.a(x).float()), a=body(), end=nn.Sequential(*tail(8)))
    net.eval()
    scales = pf.scaling_factors(net, X.float())
    zero(scales)
    with pytest.raises(pf.PlanError, match="float64.*x.to.weight.dtype"):
        pf.plan(net, X.float(), scales, "fixed")


def test_default_dtype_and_device_of_the_user(tmp_path):
    model, scales = make(EXACT["conv, activation, norm"])
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # whatever is made without a device cannot be computed with
    try:
        pf.scaling_factors(model, X, residual="couple")
        plan = pf.plan(model, X, scales, "fixed")
        slim = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
        pf.save(slim, plan, tmp_path / "slim.pt")
        assert pf.verify(model, slim, plan, X).exact
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
