"""Models called on example inputs, and the tensors that come back; modes, random numbers and
operators while they run.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .inputs import map_tensors


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Tensors are copied first: a network may work on its input in place.
    """
    args, kwargs = copied_inputs(example_inputs)
    return model(*args, **kwargs)


def first_of(example_inputs: Any) -> Any:
    """One example: the first, where a list of several is given."""
    if isinstance(example_inputs, list) and example_inputs:
        return example_inputs[0]
    return example_inputs


def copied_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, their tensors copied."""
    inputs = map_tensors(first_of(example_inputs), lambda t: t.detach().clone())
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, tuple) else ((inputs,), {})


def enlarged(example_inputs: Any, times: int) -> Any:
    """Twice as many of all, images (4-D and 5-D tensors) so many times as high and wide."""

    def repeated(tensor: Tensor) -> Tensor:
        space = tensor.dim() - 2 if tensor.dim() in (4, 5) else 0
        counts = [2, *[1] * (tensor.dim() - 1 - space), *[times] * space]
        return tensor.repeat(counts) if tensor.dim() else tensor

    return map_tensors(first_of(example_inputs), repeated)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Whatever draws random numbers inside, on the CPU or this device, draws the same ones each
    time; afterwards the random state is as before.
    """
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in a structure: containers, dataclasses, other objects with attributes, and what
    functions keep from where they were made.
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def walk(part: Any) -> None:
        if isinstance(part, Tensor):
            found.append(part)
            return
        plain = part is None or isinstance(part, (str, bytes, bool, int, float, range))
        if plain or id(part) in seen:
            return
        seen.add(id(part))
        for child in _children(part):
            walk(child)

    walk(tree)
    return found


def _children(part: Any) -> list[Any]:
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, (Sequence, Set)):
        return list(part)
    if isinstance(part, FunctionType):
        held = getclosurevars(part).nonlocals.values()
        return [each for each in held if not isinstance(each, nn.Module)]
    if isinstance(part, partial):
        return [part.func, *part.args, *part.keywords.values()]
    slots = (name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ()))
    inside = [getattr(part, name, None) for name in slots if name != "__dict__"]
    return [*inside, *getattr(part, "__dict__", {}).values()]


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Every module's own train or eval mode is put back afterwards; by its flag, since some models
    override `train`.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Operators(TorchDispatchMode):
    """Hands each operator that runs to `operator`; composite ones in their parts, too where the
    model turns inference mode on, in which they arrive whole.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.operator(func, args, kwargs)

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        return func(*args, **kwargs)


@contextmanager
def plain_eager() -> Iterator[None]:
    """No gradients, inference mode, cache of autocast weights or fused attention layers (which read
    weights past their modules, gates included), whatever surrounds it.
    """
    cached, fused = torch.is_autocast_cache_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.backends.mha.set_fastpath_enabled(fused)
