"""Gates: where they go, that they change nothing, and that the slim model has taken them in."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    NORMS,
    Bottlenecks,
    Branches,
    Grouped,
    Residual,
    SqueezeExcite,
    chain,
    conv_bn,
    settle,
)
from torch import Tensor, nn

import polarfast as pf

X = torch.randn(3, 3, 10, 10, dtype=torch.float64)
TOLERANCE = 1e-10  # of the output's variation over inputs
NETS = [chain, Residual, Branches, Grouped, Bottlenecks, SqueezeExcite]


def bare(act=nn.ReLU, kernel: int = 3) -> nn.Module:
    """A VGG without normalization: padded convolutions with biases, a hidden linear layer."""
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel, padding=pad), act(), nn.Conv2d(8, 12, kernel, padding=pad), act(),
        nn.MaxPool2d(2), nn.Conv2d(12, 10, kernel, padding=pad, bias=False), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 9), act(), nn.Linear(9, 5),
    )  # fmt: skip


def make(build, residual="keep", where=None, seed=0, share=0.5):
    """A settled network with gates away from 1, a share of each layer's at 0."""
    torch.manual_seed(seed)
    model = settle(build(), torch.randn(4, 3, 10, 10), seed=seed)
    scales = pf.add_gates(model, X, where, residual)
    with torch.no_grad():
        for gate in scales.values():
            gate.uniform_(0.3, 1.0)
            gate[torch.randperm(gate.numel())[: int(share * gate.numel())]] = 0
    return model, scales


def masked(model: nn.Module, plan: pf.PruningPlan) -> nn.Module:
    """The oracle: the network with its gates, 0 on the removed channels."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, kept in plan.kept.items():
            gone = torch.ones(model.get_parameter(name).numel(), dtype=torch.bool)
            gone[kept] = False
            model.get_parameter(name)[gone] = 0
    return model


def error(reference: nn.Module, slim: nn.Module) -> float:
    """Largest difference as a share of the output's variation over 16 inputs (which is nothing if
    a small network dies: then of its size, to 1e-13)."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(16, 3, 10, 10, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        a, b = reference(x.clone()), slim.eval()(x.clone())
    return float((a - b).abs().max() / ((a.amax(0) - a.amin(0)).max() + 1e-3 * a.abs().max()))


def is_plain(slim: nn.Module, original: nn.Module) -> bool:
    """Whether a slim model has no gate and, but for put-back norms, the constructor's classes."""
    same = all(
        isinstance(new, type(old))
        for new, old in zip(slim.modules(), original.modules(), strict=True)
    )
    return (
        same
        and not any("gate" in name for name, _ in slim.named_parameters())
        and not any("Gated" in type(module).__name__ for module in slim.modules())
    )


# --- on the model


@pytest.mark.parametrize("build", [*NETS, bare])
def test_nothing_changes_at_one(build):
    model = build()
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.normal_(module.bias)
    twin = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    scales = pf.add_gates(model, X.float(), residual="couple")
    after = model.state_dict()
    assert [name for name in after if not name.endswith(".gate")] == list(state)
    assert {name for name in after if name.endswith(".gate")} == set(scales)
    for mode in (True, False):  # in train mode first: it updates the statistics of both
        a, b = (net.train(mode)(X.float()) for net in (model, twin))
        assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    for name, param in twin.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, param.grad, atol=1e-5), name
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_a_gated_norm_counts_and_averages_like_torch(momentum, tracked):
    norm = nn.BatchNorm2d(4, momentum=momentum, track_running_stats=tracked)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    twin = copy.deepcopy(model)
    scales = pf.add_gates(model, X.float())
    with torch.no_grad():
        scales["1.gate"].copy_(torch.tensor([1.0, 0.5, 0.25, 0.0]))
    for _ in range(3):
        x = torch.randn(5, 3, 6, 6)
        factor = torch.tensor([1.0, 0.5, 0.25, 0.0]).view(1, 4, 1, 1)
        assert torch.allclose(model[:2](x), twin[:2](x) * factor, atol=1e-6)
    model.eval(), twin.eval()
    assert torch.allclose(model[:2](x), twin[:2](x) * factor, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_which_layers_get_gates():
    models = pytest.importorskip("torchvision").models
    image = torch.randn(1, 3, 64, 64)
    model = models.mobilenet_v2()
    scales = pf.add_gates(model, image, residual="expand")
    expansions = {f"features.{i}.conv.0.1.gate" for i in range(2, 18)}
    depthwise = {f"features.{i}.conv.1.1.weight" for i in range(2, 18)}
    assert expansions <= set(scales) and depthwise <= set(scales.pinned)
    projections = set(scales) - expansions - {"features.18.1.gate"}
    assert projections == {
        f"features.{i}.conv.{2 if i == 1 else 3}.gate"
        for i in (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16, 17)
    }
    again = pf.scaling_factors(model, image, residual="expand")
    assert list(again) == list(scales) and again.pinned == scales.pinned
    assert all(again[name] is gate for name, gate in scales.items())
    assert isinstance(model.features[18][1], nn.BatchNorm2d)

    model = models.resnet50()
    scales = pf.add_gates(model, image, r"bn[12]$", residual="expand")
    assert {name.rpartition(".")[0][-3:] for name in scales} == {"bn1", "bn2"}
    assert "bn1.gate" not in scales and len(scales) == 32 and not scales.others
    mixed = pf.scaling_factors(model, image, residual="expand")
    assert sum(name.endswith("bn3.weight") for name in mixed) == 16 and len(mixed) == 48


def test_all_gates_are_clamped_with_the_others():
    model = Residual()
    pf.add_gates(model, X.float(), residual="expand")
    scales = pf.scaling_factors(model, X.float(), residual="keep")
    assert set(scales.others) == {"first.4.gate", "second.4.gate"}
    assert not any(name in scales for name in scales.others)


def test_where_there_is_no_norm():
    model = bare().double()
    scales = pf.add_gates(model, X)
    assert list(scales) == ["0.gate", "2.gate", "5.gate", "9.gate"]  # not the classifier
    assert type(model[11]) is nn.Linear
    model = nn.Sequential(
        *conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    assert list(pf.add_gates(model, X.float(), ".")) == ["1.gate", "3.gate"]


def test_what_is_refused_leaves_the_model_as_it_was():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.second.weight = self.first.weight
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.second(F.relu(self.first(x)))))

    class Unused(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.BatchNorm2d(3)

    class Own(nn.BatchNorm2d):
        pass

    cases = [
        (Residual(), ["stem.1"], "stem.1: its channels meet in an addition"),
        (Residual(), ["first.1", "first.4"], "first.4: its channels meet in an addition"),
        (Residual(), ["first.0"], "first.0: a normalization reads it"),
        (Residual(), ["first.9", "nowhere"], "names no module: 'first.9', 'nowhere'"),
        (Residual(), [], "it is empty"),
        (Residual(), "nowhere", "matches no layer that can have a gate .'first.1'"),
        (Residual(), "stem", "stem.1: its channels meet in an addition"),
        (Residual(), "(", "not a regular expression"),
        (Residual(), ["fc"], "fc: "),
        (Residual(), ["first.2"], "first.2: is a ReLU"),
        (Bottlenecks(), ["block.4"], "block.4: its channels are those of the layer before the dep"),
        (Unused(), ["aside"], "aside: it does not run on the example inputs"),
        (Tied(), ["first"], "first: shares a parameter with 'second'"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), Own(3), nn.Conv2d(3, 3, 1)), None, "1: is a Own"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1)),
            ["1"],
            "affine=True",
        ),
    ]  # fmt: skip
    for model, where, message in cases:
        types = [type(module) for module in model.modules()]
        names = list(model.state_dict())
        with pytest.raises(pf.ArgumentError, match=message):
            pf.add_gates(model, X.float(), where)
        assert [type(module) for module in model.modules()] == types
        assert list(model.state_dict()) == names
    model = Residual()
    pf.add_gates(model, X.float(), ["first.1"])
    for where in (["first.1"], "first", None):
        with pytest.raises(pf.ArgumentError, match="first.1"):
            pf.add_gates(model, X.float(), where)
    assert list(pf.add_gates(model, X.float(), ["second.1"])) == ["first.1.gate", "second.1.gate"]
    with pytest.raises(pf.ArgumentError, match="wrap"):
        pf.add_gates(nn.DataParallel(Residual()), X.float())
    with pytest.raises(pf.TracingError):
        pf.add_gates(Residual(), torch.randn(1, 5))


def test_copies_files_dtypes(tmp_path):
    model, scales = make(Residual, "expand")
    wanted = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), wanted)
        assert list(pf.scaling_factors(twin, X, residual="expand")) == list(scales)
    fresh = Residual().double().eval()
    pf.add_gates(fresh, X, residual="expand")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(X), wanted)
    assert {p.dtype for p in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert model(X.to(torch.bfloat16)).dtype is torch.bfloat16
    assert "gated" in repr(model)


@pytest.mark.parametrize("build", [Residual, bare])
def test_autocast_keeps_its_dtype(build):
    model = build()
    pf.add_gates(model, X.float())
    seen = []
    for module in model.modules():
        if "gate" in module._parameters:
            module.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(X.float())
    assert seen and set(seen) == {torch.bfloat16}


def test_wrappers_know_the_gates(tmp_path):
    model = Residual()
    scales = pf.add_gates(model, X.float(), residual="expand")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled.eval()(X.float()), model.eval()(X.float()))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        wrapped(X.float()).square().sum().backward()
        pf.step(optimizer, scales, pf.Polarization(lam=0.1, t=1.2))
    finally:
        torch.distributed.destroy_process_group()
    assert list(pf.scaling_factors(wrapped, X.float(), residual="expand")) == list(scales)
    assert all(bool((gate != 1).any()) for gate in scales.values())


def test_a_batch_is_optional_behind_a_bare_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    scales = pf.add_gates(model, X)
    with torch.no_grad():
        scales["0.gate"].uniform_(0, 1)
    assert torch.allclose(model(X[0]), model(X)[0])


# --- slim


@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
@pytest.mark.parametrize("build", [*NETS, bare])
def test_zero_gates_are_exact(build, residual):
    model, scales = make(build, residual)
    for fold in ("exact", "bias", "none"):  # a gate silences β: they are one
        plan = pf.plan(model, X, scales, method="fixed", fold=fold)
        assert not plan.inexact and plan.macs < plan.macs_before
        slim = pf.slim(model, pf.PruningPlan.from_json(plan.to_json()))
        assert error(masked(model, plan), slim) < TOLERANCE
        assert pf.verify(model, slim, plan, X).exact
        assert is_plain(slim, build())
        assert plan.params == sum(p.numel() for p in slim.parameters())
        assert plan.params_before == sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize("residual", ["keep", "expand", "couple"])
def test_mobilenet_with_beta_is_exact(residual, tmp_path):
    models = pytest.importorskip("torchvision").models

    def build() -> nn.Module:
        return models.mobilenet_v2(num_classes=7, width_mult=0.25)

    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model = settle(build(), x)
    scales = pf.add_gates(model, x, residual=residual)
    with torch.no_grad():
        for gate in scales.values():
            gate[torch.randperm(gate.numel())[: gate.numel() // 2]] = 0
    plan = pf.plan(model, x, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact and plan.flops_reduction > 0.3
    with torch.no_grad():
        a, b = masked(model, plan)(x), slim(x)
    assert float((a - b).abs().max() / (a.amax(0) - a.amin(0)).max()) < TOLERANCE
    pf.save(slim, plan, tmp_path / "slim.pt")
    loaded = pf.load(tmp_path / "slim.pt", build=lambda: build().double()).eval()
    assert torch.equal(loaded(x), b)
    assert is_plain(loaded, build())


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Softplus])
def test_activations_that_do_not_vanish_at_zero(act, padding):
    model, scales = make(lambda: chain(act, 3, padding))
    plan = pf.plan(model, X, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert error(masked(model, plan), slim) < TOLERANCE
    # act(0) through zero padding needs a constant channel; it stays silent in fine-tuning.
    constant = plan.layers["1.gate"].constant
    assert len(constant) == padding
    place = [sorted([*plan.kept["1.gate"].tolist(), *constant]).index(c) for c in constant]
    assert slim[1].weight[place].tolist() == [0.0] * padding
    assert slim[1].bias[place].tolist() == [1.0] * padding


def test_bare_layers_take_constants_into_their_bias():
    model, scales = make(lambda: bare(nn.Sigmoid, kernel=1))
    plan = pf.plan(model, X, scales, method="fixed")
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert slim[5].bias is not None and model[5].bias is None  # created, behind its gate
    assert error(masked(model, plan), slim) < TOLERANCE
    assert plan.params == sum(p.numel() for p in slim.parameters())


@pytest.mark.parametrize("build", [*NETS, bare])
def test_gates_fold_without_pruning(build):
    model = build()
    scales = pf.add_gates(model, X.float(), residual="couple")
    with torch.no_grad():
        for gate in scales.values():
            gate.uniform_(0.3, 1.0)
    plan = pf.plan(model, X.float(), scales, method="fixed")
    assert plan.flops_reduction == 0
    slim = pf.slim(model.eval(), plan)
    assert is_plain(slim, build())
    assert [type(m) for m in slim.modules()] == [type(m) for m in build().modules()]
    a, b = model(X.float()), slim(X.float())
    # γ·gate is the number that the gated norm computes with.
    assert torch.equal(a, b) or (build is bare and torch.allclose(a, b, atol=1e-6))
    build().load_state_dict(slim.state_dict())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    build=st.sampled_from([chain, Residual, Branches, Grouped, bare]),
    residual=st.sampled_from(["keep", "expand", "couple"]),
    fold=st.sampled_from(["exact", "none"]),
    share=st.floats(0.0, 0.6),
    chosen=st.integers(0, 2**10),
    seed=st.integers(0, 2**16),
)
def test_gates_beside_gammas(build, residual, fold, share, chosen, seed):
    """Some layers pruned by their gates, the others by their γ."""
    model = settle(build(), torch.randn(4, 3, 10, 10), seed=seed)
    every = [
        name.removesuffix(".gate")
        for name in pf.add_gates(copy.deepcopy(model), X, residual=residual)
    ]
    subset = [name for i, name in enumerate(every) if chosen >> i & 1] or every
    gates = pf.add_gates(model, X, subset, residual)
    assert sorted(gates) == sorted(f"{name}.gate" for name in subset)
    scales = pf.scaling_factors(model, X, residual)
    assert set(gates) <= set(scales)
    with torch.no_grad():
        for factor in scales.values():
            factor.uniform_(0.3, 1.0)
            factor[torch.randperm(factor.numel())[: int(share * factor.numel())]] = 0
    plan = pf.plan(model, X, scales, method="fixed", fold=fold)
    reference = masked(model, plan)
    with torch.no_grad():
        for name, kept in plan.kept.items():
            beta = name.removesuffix("weight") + "bias"
            if fold == "none" and name.endswith(".weight"):
                keep = torch.zeros(plan.layers[name].channels)
                keep[kept] = 1
                reference.get_parameter(beta).mul_(keep)
    slim = pf.slim(model, plan)
    assert not plan.inexact
    assert is_plain(slim, build())
    assert error(reference, slim) < TOLERANCE


@pytest.mark.parametrize("build", [Bottlenecks, bare, lambda: chain(nn.Sigmoid)])
def test_the_predicted_cut_is_the_plans(build):
    model, scales = make(build, "expand")
    predictor = pf.CutPredictor(model, X, scales, method="fixed")
    assert predictor.cut() == pf.plan(model, X, scales, method="fixed").flops_reduction > 0


def test_optimizer_loses_its_gates():
    model, scales = make(Residual, "expand")
    named = [(n, p) for n, p in model.named_parameters()]
    gates = [(n, p) for n, p in named if n in scales]
    rest = [(n, p) for n, p in named if n not in scales]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": gates, "weight_decay": 0.0}], lr=0.01
    )
    model.train()(X).square().sum().backward()
    optimizer.step()
    plan = pf.plan(model, X, scales, method="fixed", value=0.1)
    slim = pf.slim(model, plan, optimizer=optimizer)
    ours = {id(p) for p in slim.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == ours
    assert {id(p) for p in optimizer.state} == ours
    assert not any("gate" in n for group in optimizer.param_groups for n in group["param_names"])
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())
    slim.train()(X).square().sum().backward()
    optimizer.step()


def test_training_moves_gates_alone():
    """Two steps beside plain SGD and a loop by hand: γ are neither regularized nor clamped."""
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.first[1].weight.fill_(1.7)
    scales = pf.add_gates(model, X.float())
    twin = copy.deepcopy(model)
    mirror = {name: twin.get_parameter(name) for name in scales}
    lam, t = 0.5, 1.2
    reg = pf.Polarization(lam=lam, t=t, clamp="all")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.3) for net in (model, twin)]
    for _ in range(2):
        for net in (model, twin):
            net.zero_grad()
            F.cross_entropy(net(X.float()), torch.tensor([0, 1, 2])).backward()
        pf.step(optimizers[0], scales, reg)
        leaves = [gate.detach().double().requires_grad_() for gate in mirror.values()]
        every = torch.cat(leaves)
        (lam * (t * every.abs() - (every - every.mean()).abs()).sum()).backward()
        for gate, leaf in zip(mirror.values(), leaves, strict=True):
            gate.grad += leaf.grad.float()
        optimizers[1].step()
        with torch.no_grad():
            for gate in mirror.values():
                gate.clamp_(0, 1)
    for name, param in twin.named_parameters():
        assert torch.allclose(model.get_parameter(name), param, atol=1e-6), name
    assert all(
        0 <= float(g.detach().min()) and float(g.detach().max()) <= 1 for g in scales.values()
    )
    assert float(model.first[1].weight.detach().max()) > 1.5
    pf.init_scales(scales, 0.5)
    assert all(bool((gate == 0.5).all()) for gate in scales.values())
