"""The processes of a run: who they are, a model on all of them (DistributedDataParallel or FSDP2),
and deterministic kernels.
"""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..errors import ArgumentError
from ..layers import convert_sync_batchnorm
from .pulse import Pulse
from .recipe import Hardware, Recipe

T = TypeVar("T")
JOINING = timedelta(minutes=5)  # until all processes are there
PATIENCE = timedelta(hours=2)  # others wait while rank 0, alive, plans, verifies and writes


class Workers:
    """This process's place among those of the run.

    Attributes:
        rank, world: number of this process, and of how many.
        device: where this process computes.
        distributed: whether there is a process group, be it of one.
    """

    def __init__(self, hardware: Hardware) -> None:
        """Join the process group that torchrun's environment describes, if there is one.

        Raises:
            ArgumentError: a GPU is asked for that is not there; "fsdp" outside torchrun.
        """
        self.distributed = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ["WORLD_SIZE"]) if self.distributed else 1
        self.device = _device(hardware.device, int(os.environ.get("LOCAL_RANK", "0")))
        if hardware.parallel == "fsdp" and not self.distributed:
            raise ArgumentError(
                "hardware.parallel='fsdp': start with torchrun --nproc-per-node=N -m polarfast ..."
            )
        self._owner = self.distributed and not dist.is_initialized()
        self._pulse: Pulse | None = None
        if self._owner:
            store = _join(self.device)
            if self.world > 1:
                patience = 60 * hardware.patience_minutes
                self._pulse = Pulse(store, self.rank, self.world, patience)

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def agree(self, flag: int) -> int:
        """The largest flag of all processes."""
        if self.world == 1:
            return flag
        flags = torch.tensor([flag])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in float64, on the CPU: the same bits everywhere."""
        values = values.detach().double().cpu()
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check_same(self, value: object, what: str) -> None:
        """Refuse to go on where processes would mix up different things in silence.

        Raises:
            ArgumentError: another process has another ``value``.
        """
        if any(other != value for other in self.gather(value)):
            raise ArgumentError(
                f"the processes found not the same {what}: it must lie on a file system that all "
                "of them share"
            )

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def alone(self) -> "Workers":
        """This process as if it were the only one: for work that the others wait for."""
        lone = copy.copy(self)
        lone.rank, lone.world = 0, 1
        return lone

    def close(self, failed: bool = False) -> None:
        """Leave the process group, `failed` if it is with an error that the others may not have."""
        if self._pulse is not None:
            self._pulse.close(failed)
        if self._owner:
            dist.destroy_process_group()


def _join(device: torch.device) -> dist.Store:
    """Enter the process group that torchrun's environment describes.

    Returns:
        Another connection to the store that its processes share.
    """
    # Small agreements travel by gloo, so that no GPU is waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=JOINING))
    # torchrun may keep its store when it starts processes again: without names of their own they
    # would look for each other where their predecessors were.
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world}"
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, timeout=JOINING, store=store, rank=rank, world_size=world)
    # Public from torch 2.14 on.
    private = dist.distributed_c10d._set_pg_timeout
    getattr(dist, "set_timeout", private)(PATIENCE, None)
    return dist.PrefixStore("pulse", store.clone())


def speaks() -> bool:
    """Whether this process is alone, or the first one of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ArgumentError(
            "hardware.device='cuda': torch finds no usable GPU here; use --hardware.device cpu"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ArgumentError(
            f"process {local_rank} of this machine has no GPU of its own (there are {count}): "
            f"use --nproc-per-node={count}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def prepare(model: nn.Module, recipe: Recipe, workers: Workers) -> nn.Module:
    """Put a model on this process's device in the form that the recipe asks for.

    Under FSDP2 the parameters are replaced by sharded ones.

    Raises:
        ArgumentError: settings that do not go together.
    """
    hardware = recipe.hardware
    _check(recipe, workers)
    model.to(workers.device)
    if hardware.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.sync_batchnorm and workers.distributed:
        model = convert_sync_batchnorm(model)
    if hardware.parallel == "fsdp":
        _shard(model, workers)
    if hardware.compile:
        model.compile()
    return model


def settle(model: nn.Module) -> nn.Module:
    """Bring FSDP2's parameters back into their sharded form, which a forward pass alone leaves."""
    for module in model.modules():
        reshard: Callable[[], None] | None = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()
    return model


def wrap(model: nn.Module, recipe: Recipe, workers: Workers) -> nn.Module:
    """What the training loop calls: the prepared model, under DDP where that is asked for."""
    if workers.world == 1 or recipe.hardware.parallel == "fsdp":
        return model
    # Statistics stay each process's own; they are averaged where they are used (see Trainer).
    distributed = nn.parallel.DistributedDataParallel
    known = inspect.signature(distributed).parameters  # renamed in torch 2.14
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False}
    return distributed(model, **options)


def _check(recipe: Recipe, workers: Workers) -> None:
    on_gpu = workers.device.type == "cuda"
    if recipe.sync_batchnorm and not on_gpu:
        raise ArgumentError("sync_batchnorm: torch's SyncBatchNorm runs on GPUs only")
    if recipe.sync_batchnorm and recipe.sparsity.gates:
        raise ArgumentError("sync_batchnorm: does not go together with sparsity.gates")
    if recipe.hardware.parallel == "fsdp" and recipe.precision == "fp16":
        raise ArgumentError("precision='fp16': FSDP2 has no loss scaling; use bf16 or fp32")


def _shard(model: nn.Module, workers: Workers) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(workers.device.type, (workers.world,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Residual blocks and the like: parts of an ``nn.Sequential`` that have parts themselves."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for part in module:
                if any(True for _ in part.children()) and not isinstance(part, nn.Sequential):
                    yield part


def model_state(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """The whole state dict on the CPU; every process must ask, rank 0 gets it."""
    if recipe.hardware.parallel != "fsdp":
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_full())


def load_model_state(model: nn.Module, state: dict[str, Any], recipe: Recipe) -> None:
    """The inverse of :func:`model_state`; every process gives the whole state."""
    if recipe.hardware.parallel != "fsdp":
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, state, options=_full())


def optimizer_state(model: nn.Module, optimizer: Optimizer, recipe: Recipe) -> dict[str, Any]:
    """The optimizer's state dict by parameter number, whole; as :func:`model_state`."""
    if recipe.hardware.parallel != "fsdp":
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    named: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_full()))
    number = {name: index for index, name in enumerate(_names(model, optimizer))}
    groups = [
        {**group, "params": [number[name] for name in group["params"]]}
        for group in named.get("param_groups", [])
    ]
    state = {number[name]: values for name, values in named.get("state", {}).items()}
    return {"state": state, "param_groups": groups}


def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, state: dict[str, Any], recipe: Recipe
) -> None:
    """The inverse of :func:`optimizer_state`."""
    if recipe.hardware.parallel != "fsdp":
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    names = _names(model, optimizer)
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {names[index]: entry for index, entry in state["state"].items()}
    named: Any = {"state": values, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=_full())


def _full() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Parameter names in the optimizer's order, which is that of its state dict's numbers."""
    name_of = {id(param): name for name, param in model.named_parameters()}
    return [name_of[id(param)] for group in optimizer.param_groups for param in group["params"]]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the block torch uses deterministic algorithms only, or raises; undone after it."""
    if not wanted:
        yield
        return
    # Read by cuBLAS when it first starts; without it torch refuses its matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        torch.backends.cudnn.benchmark = benchmark
