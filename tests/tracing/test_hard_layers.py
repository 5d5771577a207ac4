"""Layers and ways to call them: pruned to rounding, or left alone with a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.hard_nets import Net, body, tail
from support.masked import TOLERANCE, masked
from support.nets import NORMS, conv_bn, settle, zero
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf

X = torch.randn(2, 3, 10, 10, dtype=torch.float64)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.end = body(), nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6))
        self.scale, self.shift = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.a(x) * self.scale + self.shift.view(1, -1, 1, 1))


class Computed(nn.Module):
    """Scales and weights that are computed of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.end = body(), body(8, 8), nn.Sequential(*conv_bn(6, 6), *tail(6))
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 1, 1))
        self.strength = nn.Parameter(torch.rand(1))
        self.weight = nn.Parameter(torch.randn(6, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = (2 * F.softplus(self.scale) - self.strength).view(1, -1, 1, 1)
        x = self.a(x) * scale + self.shift.tanh().neg_()
        return self.end(F.conv2d(self.b(x), self.weight.tanh()))


class Shaped(nn.Module):
    """Parameters that are repeated, and weights and biases that are transposed or repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = body(), body(8, 8), body(8, 8), body(8, 8)
        self.norm, self.end = nn.BatchNorm2d(6), nn.Sequential(*body(6, 6), *tail(6))
        self.scale, self.shift = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(8))
        self.fixed = nn.Parameter(torch.randn(8, 1, 1))
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6, 1, 1)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x * self.scale.sigmoid().expand_as(x))
        x = self.c(x + self.shift.view(1, -1, 1, 1).expand(len(x), -1, 1, 1))
        x = self.d(x * self.fixed.expand(len(x), 8, 1, 1))
        return self.end(self.norm(F.conv2d(x, self.weight.transpose(0, 1), self.bias.expand(6))))


class FrozenNorm(nn.Module):
    """A normalization by buffers, as detectors have them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        bias = self.bias - self.mean * scale
        return x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


class Rows(nn.Module):
    """One parameter with a row for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.end = body(), body(8, 8), nn.Sequential(*body(8, 6), *tail(6))
        self.rows = nn.Parameter(torch.rand(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.rows[0][:, None, None]
        return self.end(self.b(x) + self.rows.select(0, 2).view(1, -1, 1, 1))


class Parts(nn.Module):
    """Layers whose weights are parts of larger parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = body(), nn.BatchNorm2d(8)
        self.end = nn.Sequential(*body(8, 6), *tail(6))
        self.weights = nn.Parameter(torch.randn(8, 8, 1, 1, 2))
        self.scales = nn.Parameter(torch.rand(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(self.a(x), self.weights[..., 1]))
        mean, var = self.norm.running_mean.detach(), self.norm.running_var.detach()
        return self.end(F.batch_norm(x, mean, var, self.scales[:, 0], self.scales[:, 1]))


class Deep(nn.Module):
    """A head that runs in training alone, behind channels that are dropped as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv, self.norm = body(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.end, self.aux = nn.Sequential(*body(8, 6), *tail(6)), nn.Conv2d(8, 2, 1)
        self.drop = nn.Sequential(nn.Dropout2d(0.2), nn.FeatureAlphaDropout(0.1))

    def forward(self, x: Tensor):
        x = self.norm(self.drop(self.conv(self.drop(self.a(x)))))
        return (self.end(x), self.aux(x)) if self.training else self.end(x)


class ChannelsLast(nn.Module):
    """LayerNorm over the channels, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = body(), nn.LayerNorm(8)
        self.free, self.end = body(8, 8), nn.Sequential(*tail(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.free(self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class OneNorm(nn.Module):
    """One normalization for two inputs, one convolution called twice, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norm, self.twice, self.tied = nn.BatchNorm2d(8), body(8, 8), body(8, 8)
        self.tied[0].weight = self.twice[0].weight
        self.free, self.end = body(8, 8), nn.Sequential(*tail(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.one(x))) - F.relu(self.norm(self.two(x)))
        return self.end(self.free(self.tied(self.twice(self.twice(y)))))


class Outputs(nn.Module):
    """Several inputs; outputs in a dict, a tuple, and None."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = body(), body(), body(8, 4)
        self.c, self.end = body(4, 6), nn.Sequential(*tail(6))

    def forward(self, x: Tensor, other: dict[str, Tensor], flag: bool = True):
        y = self.a(x) + self.b(other["image"])
        maps = self.out(y)
        return {"logits": self.end(self.c(maps)), "maps": (maps, None)} if flag else (y, None)


class Frozen(nn.Module):
    """A frozen stem, a branch under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = body(3, 8).requires_grad_(False), body(8, 8), body(8, 6)
        self.end = nn.Sequential(*conv_bn(14, 6), nn.ReLU(), *tail(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.no_grad():
            quiet = self.b(x)
        return self.end(torch.cat([self.a(x), quiet], 1))


def joined(n: nn.Module, x: Tensor) -> Tensor:
    """Concatenations of concatenations, and one along the height."""
    one, two = n.a(x), n.b(x)
    both = torch.cat([torch.cat([one, two], 1), one], 1)
    return n.end(n.c(torch.cat([both, both.flip(3)], 2)))


def chain_of(conv: type[nn.Module], norm: type[nn.Module], dims: int) -> nn.Module:
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    return nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.PReLU(8), conv(8, 8, 3, padding=1, groups=8), norm(8),
        nn.ReLU(), conv(8, 6, 2, stride=2), norm(6), nn.SiLU(), pool(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


def volume(dims: int) -> Tensor:
    return torch.randn(2, 3, *[6] * dims, dtype=torch.float64)


#: name -> builder, inputs, γ that must take part, {γ that must not: why}
CASES = {
    "layer scale": (LayerScale, X, {"a.1"}, {}),
    "computed of parameters": (
        Computed, X, {"a.1", "end.1"}, {"b.1": "not a plain parameter"},
    ),
    "shaped parameters": (
        Shaped, X, {"a.1", "b.1", "end.1"},
        {"c.1": "fixed is also used", "d.1": "not a plain parameter", "norm": ""},
    ),
    "normalized by buffers": (
        lambda: nn.Sequential(*body(), FrozenNorm(8), *body(8, 6), *tail(6)), X, {"1", "5"}, {},
    ),
    "rows of a parameter": (Rows, X, {"a.1", "b.1"}, {}),
    "circular padding": (
        lambda: nn.Sequential(
            *body(), nn.Conv2d(8, 8, 3, padding=2, padding_mode="circular"), nn.BatchNorm2d(8),
            nn.ReLU(), nn.CircularPad2d((2, 0, 1, 3)), *body(8, 6), *tail(6),
        ),
        X, {"1", "4", "8"}, {},
    ),
    "channels that are dropped": (Deep, X, {"a.1", "norm", "end.1"}, {}),
    "parts of parameters": (
        Parts, X, {"end.1"}, {"a.1": "not a plain parameter", "norm": "no single convolution"},
    ),
    "LayerNorm over channels": (ChannelsLast, X, {"free.1"}, {"a.1": "native_layer_norm"}),
    "shared norm, shared convolution, tied weights": (
        OneNorm, X, {"free.1"}, {"norm": "", "twice.1": "", "tied.1": ""},
    ),
    "several inputs and outputs": (
        Outputs, (X, {"image": X.flip(0)}), {"c.1"},
        {"a.1": "meet in an addition", "out.1": "output of the network"},
    ),
    "frozen stem and no_grad": (Frozen, X, {"stem.1", "a.1", "b.1", "end.1"}, {}),
    "concatenations": (
        lambda: Net(joined, a=body(), b=body(), c=body(24, 6), end=nn.Sequential(*tail(6))),
        X, {"a.1", "b.1", "c.1"}, {},
    ),
    "1-D": (lambda: chain_of(nn.Conv1d, nn.BatchNorm1d, 1), volume(1), {"1", "7"}, {}),
    "3-D": (lambda: chain_of(nn.Conv3d, nn.BatchNorm3d, 3), volume(3), {"1", "7"}, {}),
    "GroupNorm": (
        lambda: nn.Sequential(*body(), nn.GroupNorm(2, 8), *body(8, 6), *tail(6)), X, {"5"},
        {"1": "native_group_norm"},
    ),
    "InstanceNorm": (
        lambda: nn.Sequential(*body(), nn.InstanceNorm2d(8, affine=True), *body(8, 6), *tail(6)),
        X, {"5"}, {"1": ""},
    ),
    "parametrized": (
        lambda: nn.Sequential(
            *body(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)),
            nn.BatchNorm2d(8), nn.ReLU(), *body(8, 6), *tail(6),
        ),
        X, {"7"}, {"1": "not a plain parameter", "4": ""},
    ),
}  # fmt: skip


def batched(inputs, count: int):
    """Random inputs of the same form, so many of them."""
    if isinstance(inputs, Tensor):
        return torch.randn(count, *inputs.shape[1:], dtype=torch.float64)
    if isinstance(inputs, dict):
        return {key: batched(item, count) for key, item in inputs.items()}
    return tuple(batched(item, count) for item in inputs)


def call(model: nn.Module, inputs) -> list[Tensor]:
    with torch.no_grad():
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    found = [out["logits"], out["maps"][0]] if isinstance(out, dict) else [out]
    return [tensor.double() for tensor in found]


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "none"])
@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("name", CASES)
def test_pruned_to_rounding_or_left_alone(name, residual, fold):
    build, x, taking_part, pinned = CASES[name]
    torch.manual_seed(0)
    inputs = x if isinstance(x, tuple) else (x,)
    model = settle(build(), *inputs) if isinstance(x, Tensor) else settled(build(), x)
    scales = pf.scaling_factors(model, x, residual=residual)
    assert {f"{part}.weight" for part in taking_part} <= set(scales)
    for part, why in pinned.items() if residual == "keep" else ():
        assert f"{part}.weight" not in scales and why in scales.pinned[f"{part}.weight"]
    zero(scales)
    plan = pf.plan(model, x, scales, "fixed", fold=fold)
    slim = pf.slim(model, plan)
    seen, reference = batched(x, 8), masked(model, plan, fold == "none")
    if name in ("1-D", "3-D") and fold == "exact":  # constants through a padded depthwise layer
        assert distance(reference, slim, seen) > 0.05
        assert (
            list(plan.inexact) == ["6.weight"] and "the mean is folded" in plan.inexact["6.weight"]
        )
        report = pf.verify(model, slim, plan, x)
        assert report.notes == plan.inexact and not report.exact
        flattened(reference[6], plan.kept["1.weight"])
    else:
        assert not plan.inexact
    assert distance(reference, slim, seen) < TOLERANCE
    with FlopCounterMode(display=False) as counter:
        call(slim, x)
    assert plan.macs == counter.get_total_flops() // 2
    assert plan.params == sum(param.numel() for param in slim.parameters())


def distance(reference: nn.Module, slim: nn.Module, seen) -> float:
    """Largest difference as a share of an output's variation over the inputs."""
    pairs = zip(call(reference, seen), call(slim, seen), strict=True)
    return max(float((a - b).abs().max() / (a.amax(0) - a.amin(0)).max()) for a, b in pairs)


def flattened(reader: nn.Module, kept: Tensor) -> None:
    """In place: it reads the mean over all places in every channel that is not kept."""

    def flatten(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        mean = args[0].mean(tuple(range(2, args[0].dim())), keepdim=True).expand_as(args[0])
        return mean.index_copy(1, kept, args[0][:, kept])

    reader.register_forward_pre_hook(flatten)


def settled(model: nn.Module, inputs) -> nn.Module:
    """As `settle`, for inputs that are not all tensors."""
    model.double().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                module.bias.normal_()
                module.momentum = 1.0
        model(*inputs)
    return model.eval()


MASKS = {
    "masked_fill": lambda y, mask: y.masked_fill(mask, 0),
    "masked_fill_": lambda y, mask: (y + 0).masked_fill_(mask, 0.0),
    "where": lambda y, mask: torch.where(mask, 0.0, y),
    "where, zeros_like": lambda y, mask: torch.where(mask, torch.zeros_like(y), y),
}


@pytest.mark.parametrize("way", MASKS)
def test_what_a_mask_leaves_out(way):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.end = body(), nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *tail(6))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.end(MASKS[way](self.a(x), mask))

    model = Masked()
    inputs = X, torch.rand(2, 1, *model.a(X.float()).shape[2:]) < 0.5
    settled(model, inputs)
    scales = pf.scaling_factors(model, inputs)
    zero(scales)
    gone = scales["a.1.weight"] == 0
    assert bool(gone.any())
    assert pf.plan(model, inputs, scales, "fixed").inexact  # ReLU(β), but where the mask is
    with torch.no_grad():
        model.a[1].bias[gone] = -1.0
    plan = pf.plan(model, inputs, scales, "fixed")
    assert not plan.inexact and plan.flops_reduction > 0.1
    slim, seen = pf.slim(model, plan, inputs=inputs), (X.flip(0), ~inputs[1])
    assert distance(masked(model, plan, False), slim, seen) < TOLERANCE


def written(y: Tensor) -> Tensor:
    zeros = torch.zeros_like(y)
    zeros[..., :1] = 1
    return zeros


@pytest.mark.parametrize("with_what", ["a number", "a parameter", "zeros that are written"])
def test_what_is_filled_with_something_else_stays(with_what: str) -> None:
    fill = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(fill.bias)  # now, but it learns

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y, mask = net.a(x), x.mean(1, keepdim=True)[..., :1, :1] > 0
        others = {"a number": 1.0, "a parameter": net.fill.bias}
        other = others[with_what] if with_what in others else written(y)
        return net.end(net.b(torch.where(mask, other, y)))

    net = Net(forward, a=body(), b=body(8, 6), end=nn.Sequential(*tail(6)), fill=fill)
    assert "a.1.weight" in pf.scaling_factors(net, X.float()).pinned


def test_a_transposed_convolution_reads_and_writes_channels():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(), *body(8, 6), *tail(6),
    )  # fmt: skip
    settle(model, X)
    scales = pf.scaling_factors(model, X)
    zero(scales)
    for fold in ("exact", "none"):
        plan = pf.plan(model, X, scales, "fixed", fold=fold)
        slim = pf.slim(model, plan)
        a, b = call(masked(model, plan, fold == "none"), X), call(slim, X)
        assert not plan.inexact and torch.allclose(a[0], b[0], rtol=1e-9, atol=1e-12)
        assert slim[0].out_channels < 8


def test_sync_batchnorm():
    model = nn.Sequential(*body(), *body(8, 6), *tail(6))
    settle(model, X)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    scales = pf.scaling_factors(model, X)
    zero(scales)
    plan = pf.plan(model, X, scales, "fixed")
    slim = pf.slim(model, plan)
    assert isinstance(slim[1], nn.SyncBatchNorm) and slim[1].num_features < 8
    a, b = call(masked(model, plan, False), X), call(slim, X)
    assert torch.allclose(a[0], b[0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_wrappers_are_looked_through(tmp_path):
    model = settle(nn.Sequential(*body(), *body(8, 6), *tail(6)), X)
    names = list(pf.scaling_factors(model, X))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = [
            nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model)),
            nn.parallel.DistributedDataParallel(model), averaged,
        ]  # fmt: skip
        for wrapper in wrapped:
            scales = pf.scaling_factors(wrapper, X)
            assert list(scales) == names
            zero(scales)
            slim = pf.slim(wrapper, pf.plan(wrapper, X, scales, "fixed"))
            assert type(slim) is nn.Sequential and slim[0].out_channels < 8
    finally:
        torch.distributed.destroy_process_group()


def test_refusals_say_why():
    with pytest.raises(pf.TracingError, match="scripted"):
        pf.scaling_factors(torch.jit.script(nn.Sequential(*body(), *tail(8))), X.float())
    exported = torch.export.export(nn.Sequential(*body(), *tail(8)).eval(), (X.float(),)).module()
    with pytest.raises(pf.PolarfastError, match="export"):
        pf.scaling_factors(exported, X.float())
    with pytest.raises(pf.TracingError, match="add_gates"):
        pf.scaling_factors(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *tail(8)), X.float())


def test_hooks_and_modes_are_left_as_found():
    model = nn.Sequential(*body(), *body(8, 6), *tail(6)).train()
    model[4].eval()
    calls = []
    model[0].register_forward_pre_hook(lambda *args: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *args: calls.append("backward"))
    modes = [module.training for module in model.modules()]
    hooks = [copy.copy(module._forward_pre_hooks) for module in model.modules()]
    scales = pf.scaling_factors(model, X.float())
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X.float(), scales, "fixed"))
    assert [module.training for module in model.modules()] == modes
    assert [module._forward_pre_hooks for module in model.modules()] == hooks
    assert [module.training for module in slim.modules()] == modes
    calls.clear()
    slim(X.float()).sum().backward()
    assert calls == ["forward", "backward"]
