"""Scaling factors cut over processes by `fully_shard`: each holds a few channels of every layer.

A γ is then a DTensor. How it is cut, what a process holds of it, and how it is made whole.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ScalingFactorError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

#: What wrappers of a part of a model put into the names of its parameters.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor. Looks for the class without importing it: that takes half a second,
    and where nobody has imported it there is no such tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of a plain one."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, plain and complete on every process: one collective, differentiable.

    Raises:
        ScalingFactorError: they are not all sharded alike; the message names one.
    """
    if not any(is_sharded(tensor) for tensor in tensors.values()):
        return dict(tensors)
    sharding = Sharding(tensors)
    shapes = [tensor.shape for tensor in tensors.values()]
    parts = [tensor.to_local() for tensor in tensors.values()]  # type: ignore[attr-defined]
    return dict(zip(tensors, _Gather.apply(sharding, shapes, *parts), strict=True))


@torch.no_grad()
def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rounded to float32, on the CPU: one copy from each device, and for sharded tensors
    one collective.
    """
    plain = whole({name: tensor.detach() for name, tensor in tensors.items()})
    found = {}
    for device in {tensor.device for tensor in plain.values()}:
        here = {name: tensor for name, tensor in plain.items() if tensor.device == device}
        flat = torch.cat([tensor.reshape(-1).float() for tensor in here.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in here.values()])
        for (name, tensor), part in zip(here.items(), parts, strict=True):
            found[name] = part.view(tensor.shape)
    return {name: found[name] for name in tensors}


def overlap(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two tensors that have memory in common (one name twice: its elements have it
    among themselves); None: there are none. Of sharded ones, what this process holds counts.
    """
    spans: list[tuple[str, int, int, str]] = []  # where, first byte, byte behind the last, name
    for name, tensor in tensors.items():
        part = local(tensor)
        if not part.numel():
            continue
        size = part.element_size()
        if part.is_meta:  # no address; views share the storage
            where = f"meta {part.untyped_storage()._cdata}"
            start = int(part.storage_offset()) * size
        else:
            where, start = str(part.device), part.data_ptr()
        if part.is_contiguous():
            spans.append((where, start, start + int(part.numel()) * size, name))
        else:
            extent = 1 + sum(
                (n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True)
            )
            places = torch.arange(extent, device="cpu").as_strided(part.shape, part.stride())
            at = [start + place * size for place in places.flatten().tolist()]
            spans += [(where, each, each + size, name) for each in at]
    spans.sort()
    for (where, _, end, name), (there, start, _, other) in pairwise(spans):
        if where == there and start < end:
            return name, other
    return None


def refuse_overlap(tensors: Mapping[str, Tensor]) -> None:
    """Raise ScalingFactorError for scaling factors that have memory in common: the same numbers
    would be counted, and moved, twice.
    """
    found = overlap(tensors)
    if found is not None:
        one, other = found
        what = "have" if one == other else f"and {other!r} have"
        raise ScalingFactorError(
            f"{one!r} {what} channels in the same memory, so the same numbers would be counted and "
            "moved twice: give each channel memory of its own (nn.Parameter(param.detach().clone())"
            "), or one Parameter to both layers"
        )


def refuse_sharded(model: nn.Module) -> None:
    """Raise ArgumentError for a model whose parameters are spread over processes: it can neither be
    traced nor copied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    what = [
        f"{name or 'the model'} is in fully_shard or FullyShardedDataParallel"
        for name, module in model.named_modules()
        if isinstance(module, wrappers)
    ]
    what += [f"{name} is a DTensor" for name, p in model.named_parameters() if is_sharded(p)]
    if what:
        raise ArgumentError(
            f"the model is sharded ({what[0]}), so it cannot be traced or copied: to train, call "
            "pf.scaling_factors before sharding it and scales.rebind(model) after; to plan, slim, "
            "verify or save, load torch.distributed.checkpoint.state_dict.get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)) into a plain model, and "
            "scales.rebind(plain_model)"
        )


def present_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by the names they had before parts of it were wrapped; sharded ones as
    the optimizer sees them, also between forward and backward.

    Raises:
        ArgumentError: FullyShardedDataParallel keeps pieces that are not channels of one layer.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):  # type: ignore[union-attr]
            raise ArgumentError(
                f"{name or 'the model'} is in FullyShardedDataParallel, which keeps flattened "
                "pieces of parameters: use torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): param
        for name, param in model.named_parameters()
    }


class Sharding:
    """How a set of γ is cut: the same for all of them.

    Attributes:
        placements: of every γ, one for each dimension of the device mesh.
        group: the processes that share the channels; None where every process holds them all.
        ranks: how many these are. `rank`: which of them this process is.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed.tensor import Replicate, Shard

        first_name, first = next(iter(tensors.items()))
        for name, tensor in tensors.items():
            if is_sharded(tensor) != is_sharded(first):
                plain, cut = (first_name, name) if is_sharded(tensor) else (name, first_name)
                raise ScalingFactorError(
                    f"{plain!r} is a plain tensor and {cut!r} is a DTensor: shard the whole model "
                    "with one fully_shard mesh, or choose scales that are alike with "
                    "scales.select(pattern)"
                )
        tensor_of_all: DTensor = first  # type: ignore[assignment]
        mesh, self.placements = tensor_of_all.device_mesh, tensor_of_all.placements
        for name, tensor in tensors.items():
            if (tensor.device_mesh, tensor.placements) != (mesh, self.placements):  # type: ignore[attr-defined]
                raise ScalingFactorError(
                    f"{name!r} is placed as {tensor.placements} on {tensor.device_mesh}, but "  # type: ignore[attr-defined]
                    f"{first_name!r} as {self.placements} on {mesh}: shard all layers alike"
                )
        # Exact types: a strided shard is a subclass that numbers its channels differently.
        cut_dims = [i for i, at in enumerate(self.placements) if type(at) is not Replicate]
        if len(cut_dims) > 1 or any(
            type(self.placements[i]) is not Shard or self.placements[i] != Shard(0)
            for i in cut_dims
        ):
            raise ScalingFactorError(
                f"{first_name!r} is placed as {self.placements}: scaling factors may be cut into "
                "channels over one dimension of the mesh (Shard(0)) and be whole over the others "
                "(Replicate()), as fully_shard places them"
            )
        self.group: ProcessGroup | None = None
        self.ranks, self.rank, self._mesh_device = 1, 0, mesh.device_type
        if cut_dims:
            self.group = mesh.get_group(cut_dims[0])
            self.ranks, self.rank = mesh.size(cut_dims[0]), mesh.get_local_rank(cut_dims[0])

    def chunk(self, shape: torch.Size) -> int:
        """How many elements of a tensor the first process holds; none holds more."""
        return -(-shape[0] // self.ranks) * shape[1:].numel() if shape else 1

    def start(self, shape: torch.Size) -> int:
        """Which element of a tensor is the first that this process holds."""
        return min(self.rank * self.chunk(shape), shape.numel())

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all processes; the same bits on each, and waited for by none."""
        return self._reduce(partial, "SUM")

    def max(self, partial: Tensor) -> Tensor:
        """The largest of all processes, likewise."""
        return self._reduce(partial, "MAX")

    def _reduce(self, partial: Tensor, how: str) -> Tensor:
        if self.group is None:
            return partial
        # Factors kept on the CPU (CPUOffloadPolicy) may belong to processes that talk over GPUs.
        shared = partial.to(self._mesh_device)
        kind = getattr(torch.distributed.ReduceOp, how)
        torch.distributed.all_reduce(shared, kind, group=self.group)
        return shared.to(partial.device)

    def gather(self, flat: Tensor) -> Tensor:
        """[k] on each process -> [ranks, k] on all."""
        if self.group is None:
            return flat.unsqueeze(0)
        shared = flat.to(self._mesh_device)
        found = shared.new_empty((self.ranks, flat.numel()))
        torch.distributed.all_gather(list(found.unbind(0)), shared, group=self.group)
        return found.to(flat.device)


class Part:
    """What this process holds of all channels of some γ, one after the other: all, unless sharded.

    Raises:
        ScalingFactorError: they are not all sharded alike; the message names one.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._numel = sum(tensor.numel() for tensor in tensors.values())
        self._sharding: Sharding | None = None
        self._place: dict[int, int] = {}  # among all channels -> among those held here
        if not any(map(is_sharded, tensors.values())):
            return
        self._sharding, start = Sharding(tensors), 0
        for tensor in tensors.values():
            first = start + self._sharding.start(tensor.shape)
            for place in range(first, first + local(tensor).numel()):
                self._place[place] = len(self._place)
            start += tensor.numel()

    def places(self, among_all: list[int]) -> list[int]:
        """Of these places, those held here, counted here."""
        if self._sharding is None:
            return among_all
        return [self._place[place] for place in among_all if place in self._place]

    def of(self, gamma: Tensor, values: Tensor) -> Tensor:
        """Of one value for each channel of a γ, those of the channels held here."""
        if self._sharding is None:
            return values
        start = self._sharding.start(gamma.shape)
        return values[start : start + local(gamma).numel()]

    def mean(self, held: Tensor) -> Tensor:
        """The mean over all processes, of the values [k] that each holds; the same bits on each."""
        total = held.sum()
        return (total if self._sharding is None else self._sharding.sum(total)) / self._numel


class _Gather(torch.autograd.Function):
    """Local parts -> whole tensors. Every process has the same loss of them, so the gradient of a
    part is that part of the gradient."""

    @staticmethod
    def forward(
        ctx: Any, sharding: Sharding, shapes: Sequence[torch.Size], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sharding, ctx.shapes, ctx.local = sharding, shapes, [part.shape for part in parts]
        chunks = [sharding.chunk(shape) for shape in shapes]
        padded = [
            nn.functional.pad(part.reshape(-1), (0, chunk - part.numel()))
            for part, chunk in zip(parts, chunks, strict=True)
        ]
        gathered = sharding.gather(torch.cat(padded)).split(chunks, dim=1)
        return tuple(
            piece.reshape(-1)[: shape.numel()].reshape(shape).contiguous()
            for piece, shape in zip(gathered, shapes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own: list[Tensor] = []
        for grad, shape, local_shape in zip(grads, ctx.shapes, ctx.local, strict=True):
            start = ctx.sharding.start(shape)
            piece = grad.reshape(-1)[start : start + local_shape.numel()]
            own.append(piece.reshape(local_shape).clone())
        return None, None, *own
