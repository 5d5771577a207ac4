"""BatchNorm statistics after pruning, against those of all the data at once and torch's own way."""

import copy

import pytest
import torch
from support.engine import finish, start
from support.nets import Residual, chain, conv_bn, prepared
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import polarfast as pf

G = torch.Generator().manual_seed(5)
DATA = torch.rand(22, 3, 10, 10, generator=G)
BATCHES = list(DATA.split(6))  # the last one is smaller


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for norm in norms_of(model) for b in (norm.running_mean, norm.running_var)]


def equal(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_first_norm_gets_the_statistics_of_all_data_at_once():
    model = chain().eval()
    seen = model[0](DATA).detach().double()
    pf.recalibrate(model, BATCHES)
    torch.testing.assert_close(model[1].running_mean.double(), seen.mean((0, 2, 3)))
    torch.testing.assert_close(
        model[1].running_var.double(), seen.transpose(0, 1).flatten(1).var(1)
    )
    assert int(model[1].num_batches_tracked) == len(BATCHES)


def test_batches_that_are_alike_give_what_torch_gives():
    """With one batch, and with one batch given four times, there is nothing to weigh."""
    for batches in ([DATA], [DATA] * 4):
        ours, theirs = chain(), chain()
        theirs.load_state_dict(ours.state_dict())
        pf.recalibrate(ours, batches)
        update_bn(batches, theirs)
        torch.testing.assert_close(
            [s for s in statistics(ours)[::2]], [s for s in statistics(theirs)[::2]]
        )
        torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=2e-3, atol=0)


def test_means_are_torchs_where_batches_are_of_one_size():
    ours, theirs = chain(), chain()
    theirs.load_state_dict(ours.state_dict())
    pf.recalibrate(ours, DATA[:20].split(5))
    update_bn(DATA[:20].split(5), theirs)
    torch.testing.assert_close(statistics(ours)[::2], statistics(theirs)[::2])


@pytest.mark.parametrize("build", [chain, Residual])
@pytest.mark.parametrize("residual", ["keep", "expand"])
def test_slim_and_masked_original_stay_equal(build, residual):
    """What slim moved into running means, and its constant channels, come through it."""
    model, scales = prepared(build, residual, x=DATA.double())
    plan = pf.plan(model, DATA.double(), scales, "fixed")
    slim = pf.slim(model, plan)
    assert any(layer.constant for layer in plan.layers.values())
    before = slim(DATA.double())
    batches = [3 * batch.double() + 1 for batch in BATCHES]
    pf.recalibrate(slim, batches)
    pf.recalibrate(model, batches)
    got, wanted = slim(DATA.double()), model(DATA.double())
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got, before, rtol=1e-2)


def test_gates_change_nothing_in_the_estimate():
    plain, gated = Residual().eval(), Residual().eval()
    gated.load_state_dict(plain.state_dict())
    pf.add_gates(gated, DATA)
    for model in (plain, gated):
        pf.recalibrate(model, BATCHES)
    torch.testing.assert_close(statistics(gated), statistics(plain))


def test_norms_that_run_several_times_or_never():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
            self.unused.running_mean.fill_(7.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(2 * x)

    model = Twice()
    pf.recalibrate(model, BATCHES)
    both = torch.cat([DATA, 2 * DATA])
    torch.testing.assert_close(model.norm.running_mean, both.mean((0, 2, 3)))
    torch.testing.assert_close(model.norm.running_var, both.transpose(0, 1).flatten(1).var(1))
    assert float(model.unused.running_mean[0]) == 7.0
    assert int(model.unused.num_batches_tracked) == 0


def test_other_norms_and_everything_else_stay_as_found():
    model = nn.Sequential(
        *conv_bn(3, 4),
        nn.Dropout(0.9),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4, momentum=None),
    )
    model.train()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [module.training for module in model.modules()]
    others = {k: v.clone() for k, v in model.state_dict().items() if k[0] not in "15"}
    rng = torch.get_rng_state()
    calls: list[bool] = []
    handle = model[2].register_forward_hook(lambda m, i, o: calls.append(torch.equal(i[0], o)))
    pf.recalibrate(model, BATCHES)
    handle.remove()
    assert calls == [True] * len(BATCHES)  # hooks fired, no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], old) for name, old in others.items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model[1].momentum, model[5].momentum) == (0.1, None)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not model[1]._forward_hooks


def test_frozen_and_unselected_norms():
    model = chain().train()
    model[1].eval()
    frozen = model[1].running_mean.clone()
    pf.recalibrate(model, BATCHES)
    assert torch.equal(model[1].running_mean, frozen)
    assert not torch.equal(model[4].running_mean, torch.zeros(12))
    pf.recalibrate(model, BATCHES, frozen=True)
    assert not torch.equal(model[1].running_mean, frozen) and not model[1].training
    model.eval()
    old = statistics(model)
    pf.recalibrate(model, [2 * DATA], select="^4$")
    assert torch.equal(model[1].running_mean, old[0])
    assert not torch.equal(model[4].running_mean, old[2])


def test_the_kinds_of_batches():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
            return self.norm(x + shift)

    def found(batches, **how) -> Tensor:
        model = Named()
        pf.recalibrate(model, batches, **how)
        return model.norm.running_mean

    wanted, ones = DATA.mean((0, 2, 3)), torch.ones(len(DATA), 1, 1, 1)
    loader = DataLoader(TensorDataset(DATA, torch.zeros(len(DATA))), batch_size=6)
    torch.testing.assert_close(found(loader, labels=True), wanted)
    torch.testing.assert_close(found(iter(BATCHES)), wanted)
    torch.testing.assert_close(found([{"x": DATA, "shift": ones}]), wanted + 1)
    torch.testing.assert_close(found([(DATA, ones)], labels=False), wanted + 1)
    torch.testing.assert_close(found([((DATA, ones), None)], labels=True), wanted + 1)
    forward = found(["key"], forward=lambda model, key: model(DATA, 2.0))
    torch.testing.assert_close(forward, wanted + 2)


@pytest.mark.parametrize(
    ("batches", "how", "message"),
    [
        ([], {}, "batches is empty"),
        ([(DATA, DATA)], {}, "holds a tuple: pass labels=True if"),
        ([[DATA, DATA]], {}, "holds a list: pass labels=True if"),
        ([(DATA, DATA, DATA)], {"labels": True}, "a tuple of 3: pass forward="),
        (["x"], {}, "holds a str: pass tensors"),
        ([DATA], {"select": "nowhere"}, "no BatchNorm to estimate .select='nowhere'."),
        ([DATA, DATA * float("nan")], {}, "statistics of '1' are not finite"),
    ],
)
def test_refusals_change_nothing(batches, how, message):
    model = chain().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(pf.ArgumentError, match=message):
        pf.recalibrate(model, batches, **how)
    assert equal(model, state) and all(module.training for module in model.modules())


def test_errors_on_the_way_change_nothing():
    model = chain().eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        pf.recalibrate(model, [DATA, DATA[:, :2]])
    assert equal(model, state) and not any(module.training for module in model.modules())
    assert not model[1]._forward_hooks and model[1].momentum == 0.1


def test_bfloat16_and_wrapped_models():
    model = chain().eval()
    half = copy.deepcopy(model).bfloat16()
    pf.recalibrate(nn.DataParallel(model), BATCHES)
    pf.recalibrate(torch.compile(half, backend="eager"), [b.bfloat16() for b in BATCHES])
    assert half[1].running_mean.dtype == torch.bfloat16
    torch.testing.assert_close(
        half[1].running_var.float(), model[1].running_var, rtol=5e-2, atol=1e-2
    )


def test_no_norms_at_all():
    with pytest.raises(pf.ArgumentError, match="no BatchNorm to estimate"):
        pf.recalibrate(nn.Linear(3, 3), [torch.rand(2, 3)])


def _process(rank: int, world: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(chain().eval())
    share = DATA[:8] if rank == 0 else DATA[8:]  # shares of different sizes
    pf.recalibrate(model, share.split(4))
    seen = model.module[0](DATA).detach()
    norm = model.module[1]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.transpose(0, 1).flatten(1).var(1))
    for tensor in statistics(model):
        other = tensor.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(tensor, other)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_join_their_statistics(tmp_path):
    store = str(tmp_path / "store")
    assert finish([start(_process, rank, 2, store) for rank in range(2)]) == [0, 0]
