"""Example inputs: described, generated, converted; models called on them, and the tensors that come
back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ArgumentError, PlanError

Spec = dict[str, Any]
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def describe(inputs: Any) -> Spec:
    """What inputs look like, as plain JSON data: a tensor, or a tuple or dict of inputs.

    Raises:
        ArgumentError: something else is among the inputs.
    """
    if isinstance(inputs, Tensor):
        if inputs.is_complex():
            raise ArgumentError("example_inputs holds a complex tensor: pass real ones")
        spec: Spec = {
            "shape": list(inputs.shape),
            "dtype": str(inputs.dtype).removeprefix("torch."),
        }
        if inputs.numel():
            kind = float if inputs.is_floating_point() else int
            spec["range"] = [kind(inputs.min()), kind(inputs.max())]
        return spec
    if isinstance(inputs, (tuple, list)):
        key = "list" if isinstance(inputs, list) else "items"
        return {key: [describe(item) for item in inputs]}
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
        return {"named": {key: describe(item) for key, item in inputs.items()}}
    if inputs is None or isinstance(inputs, (bool, int, float, str)):
        return {"value": inputs}
    raise ArgumentError(
        f"example_inputs holds a {type(inputs).__name__}: pass a tensor, a tuple of positional "
        "inputs or a dict of keyword "
        "inputs, made of tensors and plain numbers"
    )


def generate(spec: Spec, *, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Random inputs of the described form, in the range of the examples.

    Floating point ones are in `dtype`; standard normal if the examples were constant.

    Raises:
        PlanError: this is no description of inputs.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def tensor(part: Spec) -> Tensor:
        own = getattr(torch, part["dtype"])
        low, high = part.get("range", (0, 0))
        if not own.is_floating_point:
            limits = int(low), int(high) + 1
            whole = torch.randint(*limits, part["shape"], generator=generator, device="cpu")
            return whole.to(device, own)
        draw = torch.rand if low < high else torch.randn
        values = draw(part["shape"], generator=generator, dtype=torch.float64, device="cpu")
        if low < high:
            values = low + (high - low) * values
        return values.to(device, dtype)

    def make(part: Spec) -> Any:
        if "shape" in part:
            return tensor(part)
        if "list" in part:
            return [make(item) for item in part["list"]]
        if "items" in part:
            return tuple(make(item) for item in part["items"])
        if "named" in part:
            return {key: make(item) for key, item in part["named"].items()}
        return part["value"]

    try:
        return make(spec)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"the plan's description of the inputs is damaged: {error}") from error


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of mappings, lists and tuples, with `function` of each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(item, function) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(item, function) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def convert(inputs: Any, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The same inputs on `device`, floating point ones in `dtype`."""
    return map_tensors(inputs, lambda t: t.to(device, dtype if t.is_floating_point() else None))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating point parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DistributedDataParallel, DataParallel, torch.compile and
    AveragedModel.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Tensors are copied first: a network may work on its input in place.
    """
    args, kwargs = copied_inputs(example_inputs)
    return model(*args, **kwargs)


def copied_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, their tensors copied."""
    inputs = map_tensors(example_inputs, lambda t: t.detach().clone())
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def enlarged(example_inputs: Any, times: int) -> Any:
    """Twice as many of all, images (4-D and 5-D tensors) so many times as high and wide."""

    def repeated(tensor: Tensor) -> Tensor:
        space = tensor.dim() - 2 if tensor.dim() in (4, 5) else 0
        counts = [2, *[1] * (tensor.dim() - 1 - space), *[times] * space]
        return tensor.repeat(counts) if tensor.dim() else tensor

    return map_tensors(example_inputs, repeated)


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
