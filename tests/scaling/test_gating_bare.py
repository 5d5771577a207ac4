"""Gates where there is no BatchNorm: convolutions of a VGG, hidden units of MLPs, transposed
convolutions; and on layers derived from torch's own.
"""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gating import is_plain
from support.gating_nets import (
    Encoder,
    Tokens,
    convnext,
    derived,
    mobilenet,
    squeezenet,
    swin,
    timm,
    transposed,
    vgg,
    vit,
)
from support.masked import TOLERANCE, error, masked
from support.nets import settle
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polarfast as pf

IMAGE = (3, 32, 32)


SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
SMALL_NEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}
# network, where, and which modules get gates
CASES: dict[str, tuple[Callable[[], nn.Module], str | None, str]] = {
    "vgg": (vgg, None, r"^(0\.(0|3|6|8)|3)$"),
    "squeezenet": (squeezenet, None, r"^features\.(0|\d+\.(squeeze|expand[13]x[13]))$"),
    "convnext": (convnext, None, r"^features\.\d\.\d\.block\.3$"),
    "vit": (vit, "mlp", r"\.mlp\.0$"),
    "swin": (swin, "mlp", r"\.mlp\.0$"),
    "squeeze-excite": (mobilenet, r"\.fc1$", r"\.block\.\d\.fc1$"),
    "timm vit": (timm("vit_tiny_patch16_224", **SMALL_VIT), "mlp", r"\.mlp\.fc1$"),
    "timm convnext": (timm("convnext_atto", **SMALL_NEXT), None, r"\.mlp\.fc1$"),
    "timm resnet": (timm("resnetv2_50", layers=(1, 1), channels=(16, 24)), None, r"\.norm[23]$"),
    "tokens": (Tokens, "mlps", r"^mlps\.\d\.0$"),
    "encoder": (Encoder, None, r"\.linear1$"),
    "post-norm encoder": (lambda: Encoder(False), None, r"\.linear1$"),
    "derived": (derived, ".", "^[036]$"),
}


def prepared(build: Callable[[], nn.Module], x: Tensor, **options: Any) -> tuple[nn.Module, Any]:
    """A network as trained, half of each layer's gates at 0, the others away from 1."""
    torch.manual_seed(0)
    model = settle(build(), x)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias") or not param.any():  # some heads start at 0
                param.add_(torch.randn_like(param), alpha=0.03)
        scales = pf.add_gates(model, x[:2], **options)
        for gate in scales.values():
            gate.uniform_(0.3, 1.0)
            gate[torch.randperm(gate.numel())[: gate.numel() // 2]] = 0
    return model, scales


def macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:  # with gradients: torch's fused forms are off
        model(x)
    return counter.get_total_flops() // 2


SLOW = {"squeeze-excite", "swin", "timm vit"}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_slim_is_the_network_with_gates_of_zero(case, tmp_path):
    build, where, expected = CASES[case]
    x = torch.rand(4, *IMAGE, dtype=torch.float64)
    model, scales = prepared(build, x, where=where)
    gated = [name for name, _ in build().named_modules() if re.search(expected, name)]
    assert [name.removesuffix(".gate") for name in scales] == gated
    plan = pf.plan(model, x[:2], scales, method="fixed")
    assert not plan.inexact and plan.macs < plan.macs_before
    slim = pf.slim(model, plan)
    assert error(masked(model, plan), slim, IMAGE) < TOLERANCE
    assert is_plain(slim, build()) and not any(m._forward_pre_hooks for m in slim.modules())
    assert plan.macs == macs(slim, x[:2])
    assert plan.macs_before == macs(build().double().eval(), x[:2])
    assert plan.params == sum(p.numel() for p in slim.parameters())
    assert plan.params_before == sum(p.numel() for p in build().parameters())
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", build=lambda: build().double()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), slim(x))
    slim.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in slim.parameters() if p.numel())


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["exact", "bias", "none"])
@pytest.mark.parametrize(
    "act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Softplus]
)
def test_hidden_units_behind_any_activation(act, fold):
    x = torch.rand(4, *IMAGE, dtype=torch.float64)
    model, scales = prepared(lambda: Tokens(act), x, where="mlps")
    plan = pf.plan(model, x, scales, method="fixed", fold=fold)
    slim = pf.slim(model, plan)
    assert not plan.inexact and list(plan.kept) == ["mlps.0.0.gate", "mlps.1.0.gate"]
    assert error(masked(model, plan), slim, IMAGE) < TOLERANCE
    assert slim.mlps[0][0].bias is None and slim.mlps[0][0].out_features == 10


def test_where_in_a_network_that_mixes_norms_and_bare_layers():
    x = torch.rand(2, *IMAGE)
    assert list(pf.add_gates(Tokens(), x)) == ["stem.1.gate", "embed.1.gate"]
    bare = ["mlps.0.0.gate", "mlps.1.0.gate"]
    assert list(pf.add_gates(Tokens(), x, "mlp")) == bare
    assert list(pf.add_gates(Tokens(), x, ".")) == ["embed.1.gate", *bare]
    for residual in ("expand", "couple"):
        assert list(pf.add_gates(Tokens(), x, "mlp", residual)) == bare
    with pytest.raises(pf.ArgumentError, match=r"embed.0: a normalization reads it"):
        pf.add_gates(Tokens(), x, ["embed.0"])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(dims, groups):
    shape = (3, *[6] * dims)
    x = torch.rand(2, *shape, dtype=torch.float64)
    model, scales = prepared(lambda: transposed(dims, groups), x)
    assert list(scales) == ["0.gate", "2.gate", "4.gate"]
    assert [gate.numel() for gate in scales.values()] == [8, 12, 6]
    twin = transposed(dims, groups).double()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "gate" not in k})
    factor = scales["2.gate"].detach().view(1, 12, *[1] * dims)
    assert torch.equal(model[2](model[:2](x)), twin[2](model[:2](x)) * factor)
    plan = pf.plan(model, x, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact and plan.macs == macs(slim, x) < plan.macs_before
    assert error(masked(model, plan), slim, shape) < TOLERANCE
    assert is_plain(slim, transposed(dims, groups))
    sized = nn.Sequential(*transposed(dims, groups)).double()
    pf.add_gates(sized, x)
    assert sized[2](sized[:2](x), output_size=[13] * dims).shape[2:] == (13,) * dims


def test_torchs_fused_layers_do_not_pass_gates_by():
    x = torch.rand(2, *IMAGE)
    model = Encoder().eval()
    assert torch.backends.mha.get_fastpath_enabled()
    scales = pf.add_gates(model, x)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        before = model(x)
        for gate in scales.values():
            gate.zero_()
        after = model(x)  # the fused form would take the weights alone
    assert torch.allclose(after, model(x), atol=1e-5) and float((before - after).abs().max()) > 0.01


def test_a_gate_that_does_not_reach_the_output_alone_is_refused():
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(super().forward(x))

    class Merged(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight, bias).square()

    x = torch.rand(2, 3, 4, 4)
    for layer in (Odd(48, 6), Merged(3, 6, 4)):
        parts = [nn.Flatten()] if isinstance(layer, nn.Linear) else []
        model = nn.Sequential(*parts, layer, nn.Flatten(), nn.Linear(6, 2))
        with pytest.raises(pf.ArgumentError, match="its class does more to its output"):
            pf.add_gates(model, x)
        assert type(layer) in (Odd, Merged) and "gate" not in dict(layer.named_parameters())


def test_hidden_units_that_are_normalized_over_all_of_them_are_refused_with_the_reason():
    class Normalized(nn.Module):
        """As ConvNeXt V2's: a unit counts by its share of all units' responses."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x))
            size = x.norm(dim=1, keepdim=True)
            return self.last(x + x * (size / (size.mean(-1, keepdim=True) + 1e-6)))

    with pytest.raises(pf.ArgumentError, match="first: flows through mean"):
        pf.add_gates(Normalized(), torch.rand(2, 5, 3), "first")


@pytest.mark.slow
def test_gated_layers_are_copied_pickled_and_compiled():
    x = torch.rand(2, *IMAGE)
    model = derived().eval()
    scales = pf.add_gates(model, x, ".")
    with torch.no_grad():
        for gate in scales.values():
            gate.uniform_()
    wanted = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), wanted)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert list(pf.scaling_factors(twin, x)) == ["0.gate", "3.gate", "6.gate"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), wanted)
