"""Factors on several processes: DDP, and FSDP2, where γ is cut (gloo, 2 to 4 processes)."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.backends import random_gammas
from support.distributed import run, sharded
from support.distributed_loop import (
    LOOPS,
    REGULARIZERS,
    WEIGHTS,
    example,
    network,
    single,
    steered,
    target,
)
from support.nets import Residual, chain, settle, zero
from support.oracles import DEEPHOYER, L1, POLARIZATION, penalty, subgradients
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import polarfast as pf
from polarfast.kernels import table_of
from polarfast.kernels.table import Penalty, SgdStep
from polarfast.sharding import local, whole

PLAN = {
    3: [
        *(f"{how}:{loop}" for how in ("ddp", "fsdp") for loop in LOOPS if loop != "sgd-4-shards"),
        *(f"subgradient:{name}" for name in REGULARIZERS),
        *(f"target:{way}-{which}" for way in ("ddp", "fsdp") for which in ("all", "some")),
        *("mixed:bfloat16", "mixed:offload", "infinite", "clamped", "cutting"),
    ],
    2: [
        "ddp:sgd",
        "fsdp:sgd",
        "fsdp:adamw-layer",
        "subgradient:weighted",
        "target:fsdp-all",
        "fsdp1",
    ],
    4: ["hybrid:2x2"],
}
TRAINED = [
    f"{world} {case}"
    for world, cases in PLAN.items()
    for case in cases
    if case.split(":")[0] in ("ddp", "fsdp", "hybrid")
]
TARGETS = [f"{world} {case}" for world in PLAN for case in PLAN[world] if "target" in case]
STEPPED = [
    f"{world} {case}"
    for world, cases in PLAN.items()
    for case in cases
    if case.split(":")[0] in ("subgradient", "mixed")
]
FORMULAS = {
    "polarization": (POLARIZATION, False, {}),
    "weighted": (POLARIZATION, False, WEIGHTS),
    "layer": (POLARIZATION, True, WEIGHTS),
    "l1": (L1, False, WEIGHTS),
    "deephoyer": (DEEPHOYER, False, WEIGHTS),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run(PLAN, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    return {loop: single(loop) for loop in LOOPS}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """This process as a group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED)
def test_training_equals_one_process(case: str, results: Any, alone: Any) -> None:
    loop = "sgd-4-shards" if "hybrid" in case else case.split(":")[1]
    start = whole(
        {name: p.detach() for name, p in pf.scaling_factors(network(), example()).items()}
    )
    ranks = results[case]
    for name, expected in alone[loop].items():
        assert not torch.equal(ranks[0][name], start[name])
        for rank in ranks:
            assert torch.equal(rank[name], ranks[0][name]), f"{name} differs between ranks"
        torch.testing.assert_close(ranks[0][name], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", TARGETS)
def test_steering_to_a_share_equals_one_process(case: str, results: Any) -> None:
    model, scales, loop = target(case.rpartition("-")[2])
    start = {name: gamma.detach().clone() for name, gamma in scales.items()}
    alone = steered(scales, loop, loop.run(model, scales))
    ranks = results[case]
    for rank in ranks:
        assert rank["state"] == ranks[0]["state"] and rank["cut"] == alone["cut"]
        for name, gamma in alone["gammas"].items():
            assert torch.equal(rank["gammas"][name], ranks[0]["gammas"][name])
            torch.testing.assert_close(rank["gammas"][name], gamma, rtol=0, atol=1e-5)
            assert (gamma - start[name]).abs().max() > 0.03
        torch.testing.assert_close(rank["value"], alone["value"], rtol=0, atol=1e-5)
        for what in ("step", "count", "live", "warned"):
            assert rank["state"][what] == alone["state"][what]
        for what in ("lam", "estimate", "centers", "rest", "speed", "way"):
            assert rank["state"][what] == pytest.approx(alone["state"][what], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPPED)
def test_subgradient_equals_autograd(case: str, results: Any) -> None:
    kind, per_layer, weights = FORMULAS[
        case.split(":")[1] if "mixed" not in case else "polarization"
    ]
    for rank in results[case]:
        names, gammas = list(rank["gammas"]), list(rank["gammas"].values())
        each = [weights.get(name, 1.0) for name in names]
        expected = dict(zip(names, subgradients(gammas, each, kind, 1.2, per_layer), strict=True))
        assert set(rank["added"]) == set(names) - {"4.weight"}, "one is frozen"
        for name, added in rank["added"].items():
            torch.testing.assert_close(added.double(), 0.02 * expected[name], rtol=0, atol=1e-6)
        for name, gradient in zip(("1.weight", "7.weight"), rank["differentiated"], strict=True):
            torch.testing.assert_close(gradient.double(), 0.02 * expected[name], rtol=0, atol=1e-7)
        value = 0.02 * penalty([g.double() for g in gammas], each, kind, 1.2, per_layer)
        torch.testing.assert_close(rank["value"].double(), value, rtol=1e-6, atol=0)
        for name, gamma in rank["unmoved"].items():
            assert torch.equal(gamma, rank["gammas"][name]), "the learning rate was 0"


@pytest.mark.slow
def test_a_step_with_an_infinite_gradient_moves_no_rank(results: Any) -> None:
    for rank in results["3 infinite"]:
        assert rank["scale"] == 4.0
        for name, before in rank["before"].items():
            assert torch.equal(rank["after"][name], before)


@pytest.mark.slow
def test_clamp_reaches_all_and_one_rank_warns_of_all_that_is_cut_off(results: Any) -> None:
    for rank in results["3 clamped"]:
        assert all(gamma.max() == 1.0 for gamma in rank["after"].values())
    (warning,), *others = [rank["warning"] for rank in results["3 clamped"]]
    assert warning.startswith("23 values in 3 of 3 BatchNorm weights")
    assert others == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["valley", "percentile", "fixed"])
def test_thresholds_are_those_of_the_whole(method: str, results: Any) -> None:
    for rank in results["3 cutting"]:
        cut, plain = rank[method]
        assert cut == plain and None not in cut.values()


@pytest.mark.slow
def test_the_older_fsdp_is_refused(results: Any) -> None:
    for said in results["2 fsdp1"]:
        assert [("fully_shard" in text) for text in said] == [True] * 3


@pytest.mark.slow
def test_forgotten_rebind_is_named(process_group: None) -> None:
    model = network()
    scales = pf.scaling_factors(model, example())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    reg = REGULARIZERS["polarization"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 1, 10, 10)).sum().backward()
    with pytest.raises(pf.StepError, match=r"scales\.rebind\(model\)"):
        pf.step(optimizer, scales, reg)
    pf.attach(optimizer, scales, reg)
    with pytest.raises(pf.ScalingFactorError, match=r"scales\.rebind\(model\)"):
        optimizer.step()


@pytest.mark.slow
def test_sharded_models_are_refused_where_they_cannot_be_traced(
    process_group: None, tmp_path: Path
) -> None:
    plain = network()
    plain_scales = pf.scaling_factors(plain, example())
    plan = pf.plan(plain, example(), plain_scales)
    slim = pf.slim(plain, plan)
    model, scales = sharded()
    for work in (
        lambda: pf.scaling_factors(model, example()),
        lambda: pf.plan(model, example(), scales),
        lambda: pf.slim(model, plan),
        lambda: pf.verify(model, slim, plan, example()),
        lambda: pf.save(
            fully_shard(slim, mesh=init_device_mesh("cpu", (1,))), plan, tmp_path / "x"
        ),
    ):
        with pytest.raises(pf.ArgumentError, match="get_model_state_dict"):
            work()
    assert not (tmp_path / "x").exists()
    with pytest.raises(pf.PlanError, match="rebind"):
        pf.plan(network(), example(), scales)


@pytest.mark.slow
def test_the_way_back_to_a_plain_model(process_group: None) -> None:
    model, scales = sharded()
    pf.init_scales({"1.weight": scales["1.weight"]}, 0.005)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = network()
    plain.load_state_dict(state)
    plan = pf.plan(plain, example(), scales.rebind(plain), method="fixed")
    assert plan.kept["1.weight"].numel() < 16 and plan.kept["7.weight"].numel() == 5


@pytest.mark.slow
def test_rebinding_finds_names_and_says_which_it_does_not(process_group: None) -> None:
    model = network()
    scales = pf.scaling_factors(model, example())
    part = scales.select("^1")
    with pytest.raises(pf.ArgumentError, match="'4.weight' has 3 channels .* and 2 where"):
        wider = network()
        wider[4] = nn.BatchNorm2d(3)
        scales.rebind(wider)
    with pytest.raises(pf.ArgumentError, match="'1.weight' is no parameter of this model"):
        scales.rebind(nn.Sequential(network()))
    for i in (1, 4):
        model[i] = checkpoint_wrapper(model[i])
    model[7] = torch.compile(model[7])
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    again = part.rebind(model)
    assert list(again) == ["1.weight"] and list(again.others) == ["4.weight", "7.weight"]
    tensors = [*again.values(), *again.others.values()]
    assert all(isinstance(tensor, DTensor) for tensor in tensors)
    model(torch.randn(4, 1, 10, 10))  # the outermost parameters stay gathered until backward
    assert part.rebind(model)["1.weight"] is again["1.weight"]


@pytest.mark.slow
def test_placements_that_are_not_channels_over_one_dimension_are_refused(
    process_group: None,
) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    line = mesh["a"]

    def placed(where: Any, placements: list[Any]) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.rand(4, 4), where, placements))

    reg = REGULARIZERS["polarization"]()
    for tensors, says in (
        ((placed(line, [Shard(0)]), nn.Parameter(torch.rand(4, 4))), "plain tensor"),
        ((placed(line, [Shard(0)]), placed(line, [Replicate()])), "shard all layers alike"),
        ((placed(line, [Shard(0)]), placed(mesh["b"], [Shard(0)])), "shard all layers alike"),
        ((placed(mesh, [Shard(0), Shard(0)]),), "over one dimension"),
        ((placed(line, [Shard(1)]),), "over one dimension"),
        ((nn.Parameter(DTensor.from_local(torch.rand(4), line, [Partial()])),), "one dimension"),
    ):
        scales = pf.ScalingFactors({f"{i}.weight": tensor for i, tensor in enumerate(tensors)})
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        with pytest.raises(pf.ScalingFactorError, match=says):
            pf.step(torch.optim.SGD(tensors, lr=0.1), scales, reg)
        with pytest.raises(pf.ScalingFactorError, match=says):
            reg.value(scales)
    gamma = placed(line, [Shard(0)])
    gamma.grad = distribute_tensor(torch.rand(4, 4), line, [Replicate()])
    with pytest.raises(pf.ScalingFactorError, match="the gradient of 'a.weight' is placed as"):
        pf.step(torch.optim.SGD([gamma], lr=0.1), pf.ScalingFactors({"a.weight": gamma}), reg)


@pytest.mark.slow
def test_a_table_of_shards_does_what_one_of_whole_factors_does(process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    plain = random_gammas([4, 7, 2])
    cut = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    for param, shard in zip(plain, cut, strict=True):
        shard.grad = distribute_tensor(param.grad.clone(), mesh, [Shard(0)])
    found = []
    for params in (plain, cut):
        state = {param: {"momentum_buffer": torch.ones_like(param)} for param in params}
        table = table_of(list("abc"), params, [1.0, 2.0, 0.5])
        assert table.refresh(state) == 3
        reg = Penalty(POLARIZATION, 0.1, 1.2)
        table.add_subgradient_(reg, torch.tensor(2.0))
        table.sgd_step_(reg, SgdStep(lr=0.1, momentum=0.9, nesterov=True))
        table.clamp_(0.5)
        buffers = [entry["momentum_buffer"] for entry in state.values()]
        found.append([local(x.detach()) for x in (*params, *buffers, *(p.grad for p in params))])
        found[-1] += table.valley()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_wrappers_and_synchronized_norms_keep_names_and_factors(process_group: None) -> None:
    model = network()
    scales = pf.scaling_factors(model, example())
    for wrapped in (
        DistributedDataParallel(model),
        torch.compile(DistributedDataParallel(model)),
        DistributedDataParallel(torch.compile(model)),
    ):
        found = pf.scaling_factors(wrapped, example())
        assert list(found) == list(scales) == list(found.rebind(wrapped))
        assert all(found[name] is scales[name] for name in scales)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(synchronized[1], nn.SyncBatchNorm)
    found = pf.scaling_factors(synchronized, example())
    assert list(found) == list(scales)
    assert all(found[name] is scales[name] for name in scales)


@pytest.mark.slow
def test_a_share_is_predicted_from_sharded_gammas_and_betas(process_group: None) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = settle(Residual(), torch.randn(4, 3, 12, 12)).float()
    scales = pf.scaling_factors(model, x, residual="expand")
    predictor = pf.CutPredictor(model, x, scales)
    left_out = pf.CutPredictor(model, x, scales)
    zero(scales)
    plain = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    scales = scales.rebind(model)
    biases = [name.removesuffix("weight") + "bias" for name in scales]
    shares = []
    for sign in (-1.0, 1.0):
        for name in biases:
            for each in (model, plain):
                beta = each.get_parameter(name).detach()
                (beta.to_local() if isinstance(beta, DTensor) else beta).fill_(sign)
        predictor.rebind(scales)
        shares.append(pf.plan(plain, x, scales.rebind(plain)).flops_reduction)
        assert predictor.cut() == predictor.cut_of(predictor.look()) == shares[-1]
    assert shares[0] != shares[1], "a constant channel more"
    with pytest.raises(pf.ArgumentError, match="'.*' is no parameter of the model"):
        left_out.rebind(scales.rebind(plain))
    with pytest.raises(pf.ArgumentError, match="which is predicted to be pruned too"):
        left_out.rebind(pf.ScalingFactors({name: scales[name] for name in list(scales)[1:]}))
    assert left_out.scales is not scales and left_out.cut() >= 0


@pytest.mark.slow
def test_a_share_that_takes_passes_through_the_network_is_not_predicted_when_sharded(
    process_group: None,
) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = settle(chain(nn.Hardswish), torch.randn(4, 3, 12, 12)).float()
    scales = pf.scaling_factors(model, x)
    target = pf.FlopsTarget(model, x, scales, 0.3)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    scales = scales.rebind(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    before = whole({name: gamma.detach().clone() for name, gamma in scales.items()})
    with pytest.raises(pf.ArgumentError, match="passes through the whole network"):
        pf.step(optimizer, scales, target)
    for name, gamma in whole({name: gamma.detach() for name, gamma in scales.items()}).items():
        assert torch.equal(gamma, before[name])
