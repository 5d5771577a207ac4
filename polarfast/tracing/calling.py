"""Calling a model on example inputs, whatever their structure, and the tensors that come back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Tensors are copied first: a network may work on its input in place.
    """
    args, kwargs = copied_inputs(example_inputs)
    return model(*args, **kwargs)


def copied_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, their tensors copied."""
    inputs = _copied(example_inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: _copied(item) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [_copied(item) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def enlarged(example_inputs: Any, times: int) -> Any:
    """Twice as many of all, images (4-D and 5-D tensors) so many times as high and wide."""
    if isinstance(example_inputs, Tensor):
        space = max(example_inputs.dim() - 2, 0) if example_inputs.dim() in (4, 5) else 0
        rest = max(example_inputs.dim() - 1 - space, 0)
        counts = [2, *[1] * rest, *[times] * space][: example_inputs.dim()]
        return example_inputs.repeat(counts) if counts else example_inputs
    if isinstance(example_inputs, Mapping):
        return {key: enlarged(item, times) for key, item in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        items = [enlarged(item, times) for item in example_inputs]
        return items if isinstance(example_inputs, list) else tuple(items)
    return example_inputs


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in a structure: containers, dataclasses and other objects with attributes."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def walk(part: Any) -> None:
        if isinstance(part, Tensor):
            found.append(part)
            return
        if part is None or isinstance(part, (str, bytes, bool, int, float)) or id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part, Mapping):
            children = list(part.values())
        elif isinstance(part, (tuple, list, set, frozenset)):
            children = list(part)
        else:
            children = list(getattr(part, "__dict__", {}).values())
        for child in children:
            walk(child)

    walk(tree)
    return found


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
