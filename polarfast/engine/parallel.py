"""A model on many processes: DistributedDataParallel or FSDP2, and its state in one plain form."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from polarfast.engine.recipe import Recipe
from polarfast.engine.workers import Workers
from polarfast.errors import ArgumentError
from polarfast.synchronization import convert_sync_batchnorm


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
