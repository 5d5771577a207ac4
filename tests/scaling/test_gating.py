"""Gates: where they go, that they change nothing at 1, and that training moves them alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.gating import NETS, X, bare, make
from support.nets import (
    NORMS,
    Bottlenecks,
    Residual,
    conv_bn,
)
from torch import Tensor, nn

import polarfast as pf


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


@pytest.mark.slow
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

    class Activated(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(super().forward(x))

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
        (nn.Sequential(Activated(3, 3, 1), nn.Conv2d(3, 3, 1)), ["0"], "0: its class does more"),
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


@pytest.mark.slow
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
