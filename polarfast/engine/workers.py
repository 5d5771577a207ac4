"""The processes of a run: one alone, or those that torchrun started."""

import copy
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from polarfast.engine.recipe import Hardware
from polarfast.errors import ArgumentError

T = TypeVar("T")
JOINING = timedelta(minutes=5)  # until all processes are there
PATIENCE = timedelta(hours=2)  # others wait while rank 0 plans, verifies and writes


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
        if self._owner:
            _join(self.device)

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

    def close(self) -> None:
        """Leave the process group."""
        if self._owner:
            dist.destroy_process_group()


def _join(device: torch.device) -> None:
    """Enter the process group that torchrun's environment describes."""
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
