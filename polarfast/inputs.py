"""Example inputs: described, generated, converted; and the models that they are of, out of their
wrappers.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from .documents import check_fields, list_of, short, truth, whole
from .errors import ArgumentError, PlanError

Spec = dict[str, Any]
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
#: What wrappers of a part of a model put into the names of its parameters.
_IN_NAMES = ("module", "_orig_mod", "_checkpoint_wrapped_module")


def describe(inputs: Any, meaning: frozenset[int] = frozenset()) -> Spec:
    """What inputs look like, as plain JSON data: a tensor, or a tuple or dict of inputs.

    Args:
        meaning: numbers of the floating point tensors whose values have a meaning; those of whole
            numbers and truth values always do.

    Raises:
        ArgumentError: something else is among the inputs.
    """
    return _describe(inputs, meaning, itertools.count())


#: How an input is described that is None.
NONE: Spec = {"value": None}
#: Elements of the inputs that a description may ask for: 8 GB in float64.
MOST_ELEMENTS = 2**30


def check_spec(spec: Any) -> None:
    """Hold a description that was read from a file against what `describe` writes, or none.

    Raises:
        ValueError: it is none, or asks for more than inputs take.
    """
    if spec != {} and _elements(spec) > MOST_ELEMENTS:
        raise ValueError(f"its inputs have more than {MOST_ELEMENTS:,} elements")


_TENSOR = {
    "shape": lambda sizes: list_of(whole(0, MOST_ELEMENTS))(sizes) and len(sizes) <= 64,
    "dtype": lambda name: isinstance(getattr(torch, str(name), None), torch.dtype),
    "range": lambda ends: (  # NaN and infinite ones too
        list_of(lambda end: type(end) in (int, float))(ends) and len(ends) == 2
    ),
    "given": truth,
}


def _elements(spec: Any) -> int:
    """How many a description asks for."""
    if not isinstance(spec, dict) or "shape" in spec:
        shape = check_fields(spec, _TENSOR, "an input", ("range", "given"))["shape"]
        return math.prod(shape)
    if len(spec) != 1:
        raise ValueError("the description of an input is damaged")
    ((key, parts),) = spec.items()
    if key == "named" and isinstance(parts, dict):
        return sum(map(_elements, parts.values()))
    if key in ("list", "items") and isinstance(parts, list):
        return sum(map(_elements, parts))
    if key != "value" or not (parts is None or isinstance(parts, (bool, int, float, str))):
        raise ValueError(f"the description of an input has a field {short(key)}")
    return 0


def _describe(inputs: Any, meaning: frozenset[int], numbers: Iterator[int]) -> Spec:
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
        if next(numbers) in meaning or not inputs.is_floating_point():
            spec["given"] = True
        return spec
    if hasattr(inputs, "_fields"):
        raise ArgumentError(
            f"example_inputs holds a {type(inputs).__name__}, a named tuple, which a plan cannot "
            "write down: let the network take its fields, as a tuple of positional inputs or a dict"
            " of keyword inputs (a module around it can put them together)"
        )
    if isinstance(inputs, (tuple, list)):
        key = "list" if isinstance(inputs, list) else "items"
        return {key: [_describe(item, meaning, numbers) for item in inputs]}
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
        return {"named": {key: _describe(item, meaning, numbers) for key, item in inputs.items()}}
    if inputs is None or isinstance(inputs, (bool, int, float, str)):
        return {"value": inputs}
    hint = ""
    if isinstance(inputs, (DataLoader, Dataset)):
        hint = ", as the images (without labels) of next(iter(loader))"
    elif hasattr(inputs, "__array__"):
        hint = ", as torch.as_tensor(array)"
    raise ArgumentError(
        f"example_inputs holds a {type(inputs).__name__}: pass a tensor, a tuple of positional "
        f"inputs or a dict of keyword inputs, made of tensors and plain numbers{hint}"
    )


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Inputs:
    """What to run a network on: inputs like the examples, and of the examples themselves whatever
    has a meaning (indices, lengths, masks, boxes).

    Attributes:
        specs: what each example looks like (`describe`).
        examples: those that were given; none where a plan was read from a file.
        divisible: whether the network is known to compute each sample by itself.
    """

    specs: tuple[Spec, ...]
    examples: tuple[Any, ...] = ()
    divisible: bool = False

    @classmethod
    def of(
        cls, example_inputs: Any, meaning: Callable[[Any], frozenset[int]] = lambda _: frozenset()
    ) -> "Inputs":
        """Of the inputs that a user gave: one example, or a list of several.

        Args:
            meaning: numbers of an example's floating point tensors, in order, whose values have a
                meaning.

        Raises:
            ArgumentError: no example, examples that are not of one network, or something that is no
                input.
        """
        examples = tuple(example_inputs) if isinstance(example_inputs, list) else (example_inputs,)
        if not examples:
            raise ArgumentError("example_inputs=[]: give at least one example")
        specs = tuple(describe(example, meaning(example)) for example in examples)
        for number, spec in enumerate(specs):
            if not _of_one_network(spec, specs[0]):
                raise ArgumentError(
                    f"example_inputs[{number}] has other inputs than example_inputs[0]: several "
                    "examples are a list of the same tensors, tuples or dicts, of which some may "
                    "leave out an optional input; the positional inputs of one example are a "
                    "tuple, and labels are none"
                )
        return cls(specs, examples)

    @property
    def whole_numbers(self) -> bool:
        """Whether some of them are; or whole numbers of Python's in a list, as lengths."""
        parts = [part for spec in self.specs for part in parts_of(spec)]
        tensors = any(getattr(torch, part["dtype"]) in _WHOLE for part in parts)
        return tensors or any(map(_lists_numbers, self.examples))

    def few(self) -> "Inputs":
        """At most two samples of each, where that is possible: what a network computes of a sample
        is to be seen there as well.
        """
        return self._cut() if self.divisible else self

    def if_divided(self) -> "Inputs | None":
        """Two samples of each; None where there are no more, or where something may have a meaning
        for each sample.
        """
        parts = [part for spec in self.specs for part in parts_of(spec)]
        counted = any(part.get("given") for part in parts) or any(
            map(_lists_numbers, self.examples)
        )
        small = self if counted else self._cut()
        return None if small.specs == self.specs else small

    def _cut(self) -> "Inputs":
        examples = tuple(map(two_of, self.examples))
        return replace(self, specs=tuple(map(two_samples, self.specs)), examples=examples)

    def make(self, *, device: torch.device, dtype: torch.dtype, seed: int, example: int = 0) -> Any:
        """Inputs to run on: what has a meaning as in one of the examples, the rest random, in its
        range. Floating point ones are in `dtype`; standard normal if the example was constant.

        Raises:
            PlanError: there is no such description; or what has a meaning is not at hand.
        """
        given = tensors_in(self.examples[example]) if self.examples else ()
        spec = self.specs[example]
        return generate(spec, device=device, dtype=dtype, seed=seed, given=given)

    def each(self, *, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Any]:
        """As `make`, of each example."""
        for example in range(len(self.specs)):
            yield self.make(device=device, dtype=dtype, seed=seed, example=example)


def map_parts(spec: Spec, function: Callable[[Spec], Spec]) -> Spec:
    """A description with `function` of each tensor's."""
    if "shape" in spec:
        return function(spec)
    if "value" in spec:
        return spec
    key, parts = next(iter(spec.items()))
    if isinstance(parts, dict):
        return {key: {name: map_parts(part, function) for name, part in parts.items()}}
    return {key: [map_parts(part, function) for part in parts]}


def parts_of(spec: Spec) -> list[Spec]:
    """The descriptions of the tensors, in order."""
    found: list[Spec] = []

    def note(part: Spec) -> Spec:
        found.append(part)
        return part

    map_parts(spec, note)
    return found


def with_meaning(spec: Spec) -> frozenset[int]:
    """Numbers of the floating point tensors whose values have a meaning, by their description."""
    parts = enumerate(parts_of(spec))
    return frozenset(n for n, part in parts if part.get("given") and "float" in part["dtype"])


def samples_in(spec: Spec) -> int | None:
    """How many there are, by the first input."""
    return next((part["shape"][0] for part in parts_of(spec) if part["shape"]), None)


def two_samples(spec: Spec) -> Spec:
    """At most two of whatever has as many as the first input."""
    samples = samples_in(spec)

    def few(part: Spec) -> Spec:
        shape = part["shape"]
        mine = bool(shape) and shape[0] == samples
        return {**part, "shape": [min(shape[0], 2), *shape[1:]]} if mine else part

    return map_parts(spec, few)


def two_of(example: Any) -> Any:
    """As `two_samples`, of the inputs themselves."""
    tensors = tensors_in(example)
    samples = next((len(tensor) for tensor in tensors if tensor.dim()), None)
    return map_tensors(example, lambda t: t[:2] if t.dim() and len(t) == samples else t)


def alike(first: Spec, second: Spec) -> bool:
    """Whether two descriptions are of the same inputs, apart from sizes and values."""
    return bool(_form(first) == _form(second))


def _of_one_network(first: Spec, second: Spec) -> bool:
    """Whether two examples are alike but for inputs that one of them leaves out, or gives as
    None: `(x,)` and `(x, mask)`, or `{"x": x}` and `{"x": x, "mask": mask}`.
    """
    if ("named" in first) != ("named" in second):
        return False
    if "named" in first:
        pairs = [(first["named"][key], second["named"].get(key, NONE)) for key in first["named"]]
    else:
        pairs = list(zip(*(s.get("items", [s]) for s in (first, second)), strict=False))
    return all(NONE in pair or alike(*pair) for pair in pairs)


def _form(spec: Spec) -> Any:
    """A description without what may differ between examples: sizes and ranges."""
    if "shape" in spec:
        return (len(spec["shape"]), spec["dtype"])
    if "value" in spec:
        return type(spec["value"])
    key, parts = next(iter(spec.items()))
    if isinstance(parts, dict):
        return {name: _form(part) for name, part in parts.items()}
    return key, [_form(part) for part in parts]


def generate(
    spec: Spec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    given: Sequence[Tensor] = (),
) -> Any:
    """As `Inputs.make`.

    Args:
        given: the example's tensors, in order; empty: they are not at hand.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    left = iter(given)

    def tensor(part: Spec) -> Tensor:
        example = next(left, None)
        own = getattr(torch, part["dtype"])
        low, high = part.get("range", (0, 0))
        if part.get("given"):
            kept = dtype if own.is_floating_point else own
            if example is not None:
                return _tiled(example.detach(), part["shape"]).to(device, kept)
            if low == high:
                return torch.full(part["shape"], low, device=device, dtype=kept)
            raise PlanError(
                f"this network takes a {part['dtype']} tensor of shape {part['shape']} whose values"
                " have a meaning (indices, lengths, masks), and a plan that was read from a file "
                "has no such values: give them, as slim(model, plan, inputs=example_inputs)"
            )
        if not own.is_floating_point:  # plans written before their meaning was known
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


def _tiled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeated or cut off to a shape of as many dimensions."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            places = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, places)
    return tensor


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


def map_numbers(tree: Any, function: Callable[[int], int]) -> Any:
    """The same structure, with `function` of each number in a list or tuple of whole numbers."""
    if isinstance(tree, Mapping):
        return {key: map_numbers(item, function) for key, item in tree.items()}
    if not isinstance(tree, (tuple, list)):
        return tree
    if tree and all(type(item) is int for item in tree):
        items = [function(item) for item in tree]
    else:
        items = [map_numbers(item, function) for item in tree]
    return items if isinstance(tree, list) else tuple(items)


def _lists_numbers(tree: Any) -> bool:
    found: list[int] = []
    map_numbers(tree, lambda number: found.append(number) or number)  # type: ignore[func-returns-value]
    return bool(found)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in dicts, lists and tuples, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for item in tree for tensor in tensors_in(item)]


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

    Raises:
        ArgumentError: this is no model, or one that holds networks and has no forward itself.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            _check_runs(model)
            return model


def _check_runs(model: Any) -> None:
    """Raise ArgumentError for what is no network: it may hold one, as averages of weights and
    Lightning modules do.
    """
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptFunction):  # tracing says what to do
        return
    if isinstance(model, nn.Module):
        owner = next(each for each in type(model).__mro__ if "forward" in vars(each))
        silent = owner is nn.Module or owner.__name__ == "LightningModule"  # only says so
        if "forward" in vars(model) or not silent:
            return
        held, what = model._modules, f"the {kind} has no forward"
    else:
        held = getattr(model, "__dict__", {}) if not isinstance(model, type) else {}
        name = f"the class {model.__name__}" if isinstance(model, type) else f"of type {kind}"
        what = f"the model is {name}, no nn.Module"
    inside = [name for name, part in held.items() if isinstance(part, nn.Module)]
    hint = f", .{inside[0]}" if inside and inside[0].isidentifier() else ""
    raise ArgumentError(
        f"{what}: pass the network itself{' that it holds' + hint if inside else ''}"
    )


def misplaced(names: Iterable[str], model: nn.Module) -> str:
    """One more cause for an error message where a model lacks parameters of these names, if it has
    them in a network that it wraps, or is the network that they are of in a wrapper; else nothing.
    """
    names, kind = list(names), type(model).__name__
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if own.intersection(names):
        return _wrapped_part(names, own)

    def there(found: Iterable[str]) -> int:
        """How many of the names; none, where only some do, as of layers that are only alike."""
        count = len(own.intersection(found))
        return count if 2 * count > len(names) else 0

    paths = [path for path, _ in model.named_modules() if path]
    path = max(paths, key=lambda path: there(f"{path}.{name}" for name in names), default="")
    if path and there(f"{path}.{name}" for name in names):
        inner = type(model.get_submodule(path)).__name__
        return (
            f"; this {kind} holds a {inner} with these names as its .{path}: give that, the network"
            f" itself (model.{path})"
        )
    outer = os.path.commonprefix(names).rpartition(".")[0].split(".")
    for depth in range(1, len(outer) + 1):
        prefix = ".".join(outer[:depth]) + "."
        if there(name.removeprefix(prefix) for name in names):
            return (
                f"; without {prefix!r} the names are this {kind}'s: they come from a wrapper that "
                f"holds such a network as its .{prefix[:-1]}. Give the network itself there too, "
                "or the wrapper here"
            )
    return _wrapped_part(names, own)


def _wrapped_part(names: list[str], own: set[str]) -> str:
    """The same where a part of the model is in a wrapper, on one side only."""

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in _IN_NAMES)

    known = {plain(name): name for name in own}
    for name in names:
        if name not in own and plain(name) in known:
            return (
                f"; {known[plain(name)]!r} of this model may be the same parameter: a part of one "
                "of the two models is in a wrapper (DataParallel, torch.compile). Wrap after "
                "pf.slim, not before"
            )
    return ""
