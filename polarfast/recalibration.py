"""`recalibrate`: BatchNorm statistics estimated anew, as they are after pruning."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import ArgumentError
from .inputs import device_of, map_tensors, unwrap
from .running import modes_kept

Forward = Callable[[nn.Module, Any], Any]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: bool | None = None,
    forward: Forward | None = None,
    select: str = "",
    frozen: bool = False,
) -> None:
    """Estimate the running mean and variance of every BatchNorm anew, in place.

    Each becomes the mean and the (unbiased) variance of all that the layer was given: every batch
    weighs as much as it has elements, and the batches' means count as part of the variance. So the
    first BatchNorm gets exactly what one batch of all the data would give it; deeper ones see what
    training sees, activations normalized batch by batch. Nothing else learns or changes: no
    gradients; all other modules are in eval mode meanwhile (no dropout); modes are put back, as
    are, if anything fails, the old statistics. Forward hooks fire as ever.

    Args:
        model: a slim or any other model. Compiled and data-parallel wrappers are looked through.
            Inside DistributedDataParallel all processes take part, each with batches of its own:
            their statistics are joined.
        batches: as from a DataLoader, each a tensor, a dict (keyword inputs), or, with `labels`, a
            tuple or list. Tensors are moved to the model's device.
        labels: for batches that are tuples or lists: True: pairs (inputs, labels), of which the
            labels are not looked at; False: all items are positional inputs.
        forward: for batches of any other kind, called as ``forward(model, batch)``.
        select: regular expression; only BatchNorms whose module name it finds are estimated.
        frozen: also those in eval mode inside a model that is in train mode. By default they are
            left alone: somebody froze them.

    Raises:
        ArgumentError: no batches; batches of a kind that has to be explained; no BatchNorm to
            estimate; statistics that are not finite.
    """
    if isinstance(batches, Tensor):
        raise ArgumentError("batches is a tensor: pass a loader, or [batch] for one batch")
    inner = unwrap(model)
    norms = _chosen(inner, select, frozen)
    call = _call(labels) if forward is None else forward
    with _in_train_mode(inner, norms), _restored_on_error(norms.values()), torch.no_grad():
        estimates = {name: _Estimate(norm) for name, norm in norms.items()}
        count = 0
        with _listening(estimates.values()):
            for batch in batches:
                call(inner, batch)
                count += 1
        if not count:
            raise ArgumentError(
                "batches is empty: pass at least one batch (an iterator can be used only once)"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            for estimate in estimates.values():
                estimate.join(model.process_group)
        for name, estimate in estimates.items():
            estimate.check(name)
        for estimate in estimates.values():
            estimate.write()


def _chosen(model: nn.Module, select: str, frozen: bool) -> dict[str, _BatchNorm]:
    try:
        regex = re.compile(select)
    except re.error as error:
        raise ArgumentError(f"select={select!r} is not a regular expression: {error}") from error
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_mean.numel()
        and (frozen or module.training or not model.training)
        and regex.search(name)
    }
    if not found:
        raise ArgumentError(
            f"the model has no BatchNorm to estimate (select={select!r}): only such as keep "
            "running statistics are, and in a model in train mode only such as are in train mode "
            "themselves, unless frozen=True"
        )
    return found


def _call(labels: bool | None) -> Forward:
    """How to give a batch to the model."""

    def call(model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, (tuple, list)):
            if labels is None:
                raise ArgumentError(
                    f"batches holds a {type(batch).__name__}: pass labels=True if it is a pair "
                    "(inputs, labels), labels=False if all its items are inputs"
                )
            if labels:
                if len(batch) != 2:
                    raise ArgumentError(
                        f"labels=True means pairs (inputs, labels), but batches holds a "
                        f"{type(batch).__name__} of {len(batch)}: pass forward="
                    )
                batch = batch[0]
        device = device_of(model)
        batch = map_tensors(batch, lambda t: t.to(device))
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, dict):
            return model(**batch)
        if isinstance(batch, (tuple, list)):
            return model(*batch)
        raise ArgumentError(
            f"batches holds a {type(batch).__name__}: pass tensors, dicts of keyword inputs, "
            "tuples with labels=, or say how with forward=lambda model, batch: ..."
        )

    return call


@contextmanager
def _in_train_mode(model: nn.Module, norms: dict[str, _BatchNorm]) -> Iterator[None]:
    """These norms alone in train mode."""
    chosen = set(map(id, norms.values()))
    with modes_kept(model):
        for module in model.modules():
            module.training = id(module) in chosen
        yield


@contextmanager
def _restored_on_error(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Statistics as they were if anything fails; momenta as they were in any case."""
    saved = [
        (norm, norm.momentum, [(buffer, buffer.clone()) for _, buffer in _buffers(norm)])
        for norm in norms
    ]
    try:
        yield
    except BaseException:
        for _, _, buffers in saved:
            for buffer, old in buffers:
                buffer.data.copy_(old)
        raise
    finally:
        for norm, momentum, _ in saved:
            norm.momentum = momentum


def _buffers(norm: _BatchNorm) -> list[tuple[str, Tensor]]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    found = [(name, getattr(norm, name)) for name in names]
    return [(name, buffer) for name, buffer in found if buffer is not None]


@contextmanager
def _listening(estimates: Iterable["_Estimate"]) -> Iterator[None]:
    handles = []
    try:
        for estimate in estimates:
            estimate.norm.momentum = 1.0  # the running statistics become those of the last call
            handles.append(estimate.norm.register_forward_hook(estimate.add))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Estimate:
    """Mean and variance of all inputs of one norm."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.calls, self.count = 0, 0
        self._before = [(buffer, buffer.clone()) for _, buffer in _buffers(norm)]
        mean = norm.running_mean
        assert mean is not None
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        self.mean, self.squares = (torch.zeros_like(mean, dtype=wide) for _ in range(2))

    def add(self, norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """After each call: join what it saw with what there is (Chan et al. 1979)."""
        running_mean, running_var = self.norm.running_mean, self.norm.running_var
        assert running_mean is not None and running_var is not None
        count = inputs[0].numel() // self.mean.numel()
        total = self.count + count
        delta = running_mean.to(self.mean.dtype) - self.mean
        self.mean += delta * (count / total)
        self.squares += running_var.to(self.mean.dtype) * (count - 1)
        self.squares += delta.square() * (self.count * count / total)
        self.calls, self.count = self.calls + 1, total

    def join(self, group: Any) -> None:
        """With what the other processes saw."""

        def summed(tensor: Tensor) -> Tensor:
            torch.distributed.all_reduce(tensor, group=group)
            return tensor

        counts = summed(self.mean.new_tensor([self.count, self.calls]))
        if not counts[0]:
            return
        mean = summed(self.mean * self.count) / counts[0]
        self.squares = summed(self.squares + self.count * (self.mean - mean).square())
        self.mean = mean
        self.count, self.calls = int(counts[0]), int(counts[1])

    def check(self, name: str) -> None:
        """Raise ArgumentError unless the statistics can be used."""
        if not bool((self.mean.isfinite() & self.squares.isfinite()).all()):
            raise ArgumentError(
                f"the statistics of {name!r} are not finite: look for NaN or infinite numbers in "
                "the batches and in the weights"
            )

    def write(self) -> None:
        """Give the norm its new statistics; the old ones, where it never ran."""
        if not self.calls:
            for buffer, old in self._before:
                buffer.copy_(old)
            return
        new = {
            "running_mean": self.mean,
            "running_var": self.squares / (self.count - 1),
            "num_batches_tracked": torch.tensor(self.calls, device="cpu"),
        }
        for name, buffer in _buffers(self.norm):
            buffer.copy_(new[name])
