"""What test_sharded.py runs in several processes: each case returns plain tensors from each rank.

`run` starts a process of its own for them, which forks the ranks.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import polarfast as pf
from support import TESTS, distributed_loop
from support.distributed_loop import (
    LOOPS,
    OPTIMIZERS,
    REGULARIZERS,
    Loop,
    batch,
    example,
    network,
    whole,
)


def ddp(name: str) -> dict[str, Tensor]:
    model = DistributedDataParallel(network(), gradient_as_bucket_view="clip" in name)
    scales = pf.scaling_factors(model, example())
    return Loop(**LOOPS[name]).run(
        model,
        scales,
        dist.get_rank(),
        dist.get_world_size(),
        lambda last: nullcontext() if last else model.no_sync(),
    )


def sharded(mesh: Any = None, **kwargs: Any) -> tuple[nn.Module, pf.ScalingFactors]:
    """The network under fully_shard, in two units, and its factors."""
    model = network()
    scales = pf.scaling_factors(model, example())
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    if "mp_policy" in kwargs:  # torch's BatchNorm wants its statistics in the weights' dtype
        for buffer in (b for b in model.buffers() if b.is_floating_point()):
            buffer.data = buffer.data.to(kwargs["mp_policy"].param_dtype)
    fully_shard(model[3], mesh=mesh, **kwargs)
    fully_shard(model, mesh=mesh, **kwargs)
    return model, scales.rebind(model)


def fsdp(name: str, mesh: Any = None) -> dict[str, Tensor]:
    model, scales = sharded(mesh)

    def sync(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return Loop(**LOOPS[name]).run(model, scales, dist.get_rank(), dist.get_world_size(), sync)


def hybrid(shape: str) -> dict[str, Tensor]:
    """A mesh of replicas by shards."""
    sizes = tuple(int(size) for size in shape.split("x"))
    return fsdp(
        "sgd-4-shards", init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    )


def target(how: str) -> dict[str, Any]:
    """FlopsTarget, made before the model is spread."""
    way, _, which = how.partition("-")
    model, scales, loop = distributed_loop.target(which)
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[3], mesh=mesh)
        fully_shard(model, mesh=mesh)
        scales = scales.rebind(model)

        def sync(last: bool) -> Any:
            model.set_requires_gradient_sync(last)
            return nullcontext()
    else:
        model = DistributedDataParallel(model)

        def sync(last: bool) -> Any:
            return nullcontext() if last else model.no_sync()

    gammas = loop.run(model, scales, dist.get_rank(), dist.get_world_size(), sync)
    return distributed_loop.steered(scales, loop, gammas)


def subgradient(reg_name: str, **kwargs: Any) -> dict[str, Any]:
    """γ, and what one step adds to their gradients; one γ is frozen."""
    model, scales = sharded(**kwargs)
    scales["4.weight"].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.0)
    images, labels = batch(0, dist.get_rank())
    F.cross_entropy(model(images).float(), labels).backward()
    before = {n: p.grad.full_tensor() for n, p in scales.items() if p.grad is not None}
    reg = REGULARIZERS[reg_name]()
    gammas = whole(scales)
    pf.step(optimizer, scales, reg)
    after = {n: p.grad.full_tensor() for n, p in scales.items() if p.grad is not None}
    value = reg.value(scales)
    differentiated = torch.autograd.grad(value, [scales["1.weight"], scales["7.weight"]])
    return {
        "gammas": gammas,
        "added": {n: after[n] - before[n] for n in after},
        "value": value.detach(),
        "differentiated": [grad.full_tensor() for grad in differentiated],
        "unmoved": whole(scales),
    }


def mixed(policy: str) -> dict[str, Any]:
    if policy == "bfloat16":
        kwargs: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    else:
        kwargs = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    return subgradient("polarization", **kwargs)


def infinite() -> dict[str, Any]:
    """A step that the scaler skips on every rank, because of one rank's one channel."""
    model, scales = sharded()
    optimizer = OPTIMIZERS["fused"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(batch(0, 0)[0]).sum()).backward()
    if dist.get_rank() == 0:
        scales["4.weight"].grad.to_local()[0] = torch.inf
    before = whole(scales)
    pf.step(optimizer, scales, REGULARIZERS["polarization"](), scaler=scaler)
    scaler.update()
    return {"before": before, "after": whole(scales), "scale": scaler.get_scale()}


def clamped() -> dict[str, Any]:
    """γ above `upper`, and a BatchNorm weight that takes no part, at the first step."""
    model, scales = sharded()
    part = scales.select("^[14]")
    pf.init_scales(part, 3.0)
    pf.init_scales({"7.weight": scales["7.weight"]}, 2.0)
    optimizer = SGD(model.parameters(), lr=1e-6)
    model(batch(0, 0)[0]).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pf.step(optimizer, part, pf.Polarization(lam=1e-4, t=1.2, clamp="all"))
    text = [str(w.message) for w in caught if "clamped from now on" in str(w.message)]
    return {"after": whole(scales), "warning": text}


def cutting() -> dict[str, Any]:
    """Thresholds of sharded factors beside those of the same factors, whole."""
    model, scales = sharded()
    with torch.no_grad():
        for i, gamma in enumerate(scales.values()):
            generator = torch.Generator().manual_seed(i)
            values = torch.rand(gamma.shape, generator=generator)
            values[: len(values) // 2] *= 0.03
            mine = torch.chunk(values, dist.get_world_size())
            if dist.get_rank() < len(mine):
                gamma.to_local().copy_(mine[dist.get_rank()])
    plain = pf.ScalingFactors({n: nn.Parameter(t) for n, t in whole(scales).items()})
    rules: list[tuple[str, float | None]] = [("valley", None), ("percentile", 0.3), ("fixed", 0.1)]
    return {
        method: (pf.thresholds(scales, method, value), pf.thresholds(plain, method, value))
        for method, value in rules
    }


def fsdp1() -> list[str]:
    """The older FullyShardedDataParallel keeps pieces that say nothing of their channels."""
    model = network()
    scales = pf.scaling_factors(model, example())
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = SGD(model.parameters(), lr=0.1)
    model(batch(0, 0)[0]).sum().backward()
    said = []
    for work in (
        lambda: scales.rebind(model),
        lambda: pf.scaling_factors(model, example()),
        lambda: pf.step(optimizer, scales, REGULARIZERS["polarization"]()),
    ):
        try:
            work()
        except pf.PolarfastError as error:
            said.append(str(error))
    return said


CASES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(ddp, fsdp, target, hybrid, subgradient, mixed),
        *(infinite, clamped, cutting, fsdp1),
    )
}


def run(plan: dict[int, list[str]], folder: Path, timeout: float = 200) -> dict[str, list[Any]]:
    """Run "case" or "case:argument", by the number of processes; what each rank returned."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", "support.distributed", str(folder), json.dumps(plan)],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its ranks can be ended with it
    )
    try:
        said, _ = launcher.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, said[-4000:]
    found = {}
    for world, cases in plan.items():
        ranks = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        found |= {f"{world} {case}": [rank[case] for rank in ranks] for case in cases}
    return found


def rank_main(rank: int, world: int, folder: Path, cases: list[str]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'init{world}'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for case in cases:
        name, _, argument = case.partition(":")
        results[case] = CASES[name](*([argument] if argument else []))
    torch.save(results, folder / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that all that is imported above is imported once.
    for count, names in json.loads(sys.argv[2]).items():
        start_processes(
            rank_main,
            args=(int(count), Path(sys.argv[1]), names),
            nprocs=int(count),
            start_method="fork",
        )
