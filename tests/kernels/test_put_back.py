"""Put-back: the ops and the norms of slim models against plain indexing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nets import Residual, settle, zero
from torch import Tensor, nn

import polarfast as pf
from polarfast.kernels.put_back import put_back, put_back_by_reading, put_back_norm
from polarfast.layers import PUT_BACK, PutBack

OPS = torch.ops.polarfast
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
X = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def indexed(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """The oracle: assignment by index."""
    out = torch.empty(kept.shape[0], constant.numel(), *kept.shape[2:], dtype=kept.dtype)
    for channel, value in enumerate(constant.tolist()):
        out[:, channel] = value
    out[:, index] = kept
    return out


def norm_of(kind: type[nn.Module], kept: int = 5, width: int = 9, seed: int = 0) -> nn.Module:
    """A put-back norm in eval mode, with numbers as after training."""
    torch.manual_seed(seed)
    norm = PUT_BACK[kind](kept)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    norm.hold(torch.randperm(width)[:kept].sort().values, torch.randn(width))
    return norm.eval()


def by_hand(norm: nn.Module, x: Tensor) -> Tensor:
    """What such a norm means, in eval mode, in float64."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        t.detach().double().view(shape)
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    kept = (x.detach().double() - mean) / (var + norm.eps).sqrt() * weight + bias
    return indexed(kept, norm.put_back_index, norm.put_back_constant.double())


@st.composite
def cases(draw):
    rank = draw(st.integers(2, 5))
    width = draw(st.integers(1, 40))  # more than a vector holds
    places = draw(st.lists(st.integers(0, width - 1), unique=True, min_size=1))
    places = sorted(places) if draw(st.booleans()) else places
    shape = [draw(st.integers(0, 3)), len(places)]
    shape += [draw(st.integers(0 if d == 0 else 1, 4)) for d in range(rank - 2)]
    return shape, places, width, draw(st.booleans()), draw(st.sampled_from(FLOATS))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_any_shape_place_and_layout(case):
    """Ranks 2 to 5, one to all channels kept, places in any order, no samples, no positions."""
    shape, places, width, last, dtype = case
    kept = torch.randn(shape).to(dtype)
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(kept.dim())
    if last and memory_format is not None:
        kept = kept.to(memory_format=memory_format)
    index, constant = torch.tensor(places, dtype=torch.long), torch.randn(width)
    got = OPS.put_back(kept, index, constant)
    assert got.dtype == dtype and got.is_contiguous() >= kept.is_contiguous()
    assert torch.equal(got, indexed(kept, index, constant.to(dtype)))
    for same in (put_back(kept, index, constant), put_back_by_reading(kept, index, constant)):
        assert torch.equal(got, same)


def test_no_channel_kept():
    index, constant = torch.tensor([], dtype=torch.long), torch.tensor([1.5, -2.0])
    got = OPS.put_back(torch.empty(2, 0, 3), index, constant)
    assert torch.equal(got, constant.view(1, 2, 1).expand(2, 2, 3))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_norm_in_eval_mode_equals_its_formula(dtype, memory_format):
    norm = norm_of(nn.BatchNorm2d)
    x = torch.randn(3, 5, 7, 6).to(dtype, memory_format=memory_format)
    own = copy.deepcopy(norm).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        got = own(x)
    assert got.dtype == dtype and got.is_contiguous(memory_format=memory_format)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), by_hand(own, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", PUT_BACK, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("affine", [True, False])
def test_every_kind_of_norm_gives_the_same_with_and_without_a_graph(kind, affine):
    """Without one, norm and put-back are one pass."""
    norm = norm_of(kind)
    if not affine:
        norm.bias = None
    rank = {nn.BatchNorm1d: 2, nn.BatchNorm3d: 5}.get(kind, 4)
    x = torch.randn(6, 5, *[4] * (rank - 2))
    with torch.no_grad():
        got = norm(x)
    wanted = norm(x)
    assert wanted.grad_fn is not None
    torch.testing.assert_close(got, wanted.detach(), rtol=2e-6, atol=2e-6)


def test_many_rows_on_several_threads():
    norm, x = norm_of(nn.BatchNorm2d, 70, 150), torch.randn(9, 70, 31, 33)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                results.append([norm(x), norm(x.to(memory_format=torch.channels_last))])
        finally:
            torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
        torch.testing.assert_close(one.double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_has_the_gradients_of_plain_indexing(memory_format):
    norm = norm_of(nn.BatchNorm2d).train()
    plain = nn.BatchNorm2d(5).train()
    plain.load_state_dict({k: v for k, v in norm.state_dict().items() if "put_back" not in k})
    x = torch.randn(3, 5, 4, 4).to(memory_format=memory_format)
    factor = torch.randn(3, 9, 4, 4).to(memory_format=memory_format)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (norm(ours) * factor).sum().backward()
    kept = plain(theirs)
    (kept * factor[:, norm.put_back_index]).sum().backward()
    for a, b in ((ours, theirs), (norm.weight, plain.weight), (norm.bias, plain.bias)):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_gradients_of_first_and_second_order():
    index, constant = torch.tensor([1, 4]), torch.randn(5, dtype=torch.float64)
    kept = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return OPS.put_back(x, index, constant) ** 3

    assert torch.autograd.gradcheck(function, kept)
    assert torch.autograd.gradgradcheck(function, kept)


def test_frozen_norms_pass_gradients_on():
    """In eval mode but within training: norm and put-back are not one pass then."""
    norm, x = norm_of(nn.BatchNorm2d).requires_grad_(False), torch.randn(2, 5, 3, 3)
    x.requires_grad_()
    norm(x).sum().backward()
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(x.grad, slope.view(1, -1, 1, 1).expand_as(x))


def test_the_output_is_memory_of_its_own():
    norm, x = norm_of(nn.BatchNorm2d), torch.randn(2, 5, 3, 3)
    with torch.no_grad():
        first = norm(x)
        wanted = first.clone()
        first += 1.0
        assert torch.equal(norm(x), wanted)


def test_transforms_of_functions_see_plain_operators():
    norm, x = norm_of(nn.BatchNorm2d), torch.randn(6, 2, 5, 3, 3)
    wanted = torch.stack([norm(part) for part in x])
    torch.testing.assert_close(torch.vmap(norm)(x), wanted)
    _, tangent = torch.func.jvp(norm, (x[0],), (torch.ones_like(x[0]),))
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(tangent[:, norm.put_back_index], slope.view(1, -1, 1, 1) + 0 * x[0])


def test_autocast_gives_the_dtype_of_the_norm():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), norm_of(nn.BatchNorm2d)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            got = net(X)
        wanted = net(X)
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted.detach(), rtol=2e-2, atol=2e-2)


def test_a_norm_refuses_inputs_of_another_rank_as_torch_does():
    with torch.no_grad(), pytest.raises(ValueError, match="expected 4D input"):
        norm_of(nn.BatchNorm2d)(torch.randn(2, 5, 3))


@pytest.mark.parametrize(
    ("kept", "index", "constant", "message"),
    [
        ((2, 2), [0, 3], 3, r"index\[1\] is 3, outside the 3 channels"),
        ((2, 2), [-1, 1], 3, r"index\[0\] is -1, outside"),
        ((2, 2), [1, 1], 3, r"index\[1\] is 1 for the second time"),
        ((2, 2), [1], 3, "index has 1 places for 2 channels"),
        ((2,), [1], 3, "input must be a CPU tensor"),
    ],
)
def test_bad_places_are_refused(kept, index, constant, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.put_back(torch.rand(kept), torch.tensor(index), torch.rand(constant))


def test_bad_numbers_are_refused():
    x, index, constant, ok = torch.rand(2, 2), torch.tensor([0, 2]), torch.rand(3), torch.rand(2)
    with pytest.raises(RuntimeError, match="var must be a contiguous CPU tensor of 2 elements"):
        put_back_norm(x, index, constant, ok, None, ok, torch.rand(3), 1e-5)
    with pytest.raises(RuntimeError, match="index must be a contiguous 1-D int64"):
        OPS.put_back(x, index.int(), constant)
    with pytest.raises(RuntimeError, match="input must be contiguous or channels_last"):
        OPS.put_back(torch.rand(2, 2).T.expand(2, 2)[:, ::2].expand(2, 2), index, constant)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format):
    index, constant, ok = torch.tensor([1, 4]), torch.rand(5), torch.rand(2)
    x = torch.rand(3, 2, 4, 4).to(memory_format=memory_format)
    torch.library.opcheck(OPS.put_back.default, (x, index, constant))
    torch.library.opcheck(OPS.put_back.default, (x.clone().requires_grad_(), index, constant))
    torch.library.opcheck(OPS.put_back_norm.default, (x, index, constant, ok, ok, ok, ok, 1e-5))


def expanded() -> tuple[nn.Module, nn.Module]:
    """A residual network with half of its γ at 0, and its slim model with put-back norms."""
    model = settle(Residual(), X)
    scales = pf.scaling_factors(model, X.double(), residual="expand")
    zero(scales)
    slim = pf.slim(model, pf.plan(model, X.double(), scales, "fixed"))
    assert any(isinstance(module, PutBack) for module in slim.modules())
    return model, slim


def test_slim_models_are_the_same_with_and_without_a_graph():
    model, slim = expanded()
    with torch.inference_mode():
        got = slim(X.double())
    torch.testing.assert_close(got, slim(X.double()).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, model(X.double()).detach(), rtol=1e-9, atol=1e-9)


def test_compiles_into_torchs_own_operators_without_a_graph_break():
    _, slim = expanded()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(slim, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(X.double()), slim(X.double()))
    assert any("where" in name for name in seen)
    assert not any("polarfast" in name for name in seen)


def test_exports_into_torchs_own_operators():
    _, slim = expanded()
    program = torch.export.export(slim, (X.double(),))
    assert "polarfast" not in program.graph_module.code
    torch.testing.assert_close(program.module()(X.double()), slim(X.double()))
    traced = torch.jit.trace(slim, X.double())
    assert "polarfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X[:2].double()), slim(X[:2].double()))
