"""When a trace can be used again: `Traced`.

`scaling_factors`, `plan` and `slim` each need the network's channels, and tracing takes longer than
most of what follows. So what was found is handed on, privately, together with a fingerprint of what
it was found in. It holds for the very same model while nothing about it has changed that its code
can see (of the values of tensors, only buffers that are a single number), and for inputs of the
same description. Whatever cannot be judged (an attribute that is an object of some other library)
counts as changed.
"""

import enum
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..inputs import Spec, describe
from ..layers import can_put_back
from ..sharding import refuse_sharded
from .classes import Channels
from .dryrun import trace

#: Values that are what they look like.
PLAIN = frozenset(
    (type(None), bool, int, float, complex, str, bytes, range, slice)
    + (torch.dtype, torch.device, torch.layout, torch.memory_format)
)
#: Attributes of every module that are looked at apart, or that a trace does not depend on.
APART = frozenset(("training", "_parameters", "_buffers", "_modules"))
#: Buffers that training changes and no code looks at to decide what to do.
STATISTICS = frozenset(("running_mean", "running_var", "num_batches_tracked"))
#: Containers are looked into so deep.
DEPTH = 8


def analyze(model: nn.Module, example_inputs: Any, residual: str) -> Channels:
    """Trace an (unwrapped) model and sort its channels into classes."""
    refuse_sharded(model)

    def putting_back(name: str) -> bool:
        return can_put_back(model.get_submodule(name.rpartition(".")[0]))

    return Channels(trace(model, example_inputs), residual, putting_back)


class Traced:
    """The channels of a model, and what they were found in. Keeps neither the model nor any of its
    tensors alive.

    Attributes:
        channels: the channel classes.
    """

    def __init__(self, model: nn.Module, spec: Spec | None, channels: Channels) -> None:
        self.channels = channels
        self._model = weakref.ref(model)
        self._spec = spec
        self._fingerprint = None if spec is None else fingerprint(model)

    def fits(self, model: nn.Module, spec: Spec | None, residual: str) -> bool:
        """Whether a trace of this model on such inputs would find the same."""
        return (
            self._model() is model
            and self._fingerprint is not None
            and self.channels.residual == residual
            and self._spec == spec
            and self._fingerprint == fingerprint(model)
        )


def traced(
    model: nn.Module, example_inputs: Any, residual: str, known: Traced | None = None
) -> Traced:
    """Trace an (unwrapped) model, or take over what is known of it."""
    try:
        spec = describe(example_inputs)
    except ArgumentError:  # inputs that no plan could describe; the network may take them
        spec = None
    if known is not None and known.fits(model, spec, residual):
        return known
    return Traced(model, spec, analyze(model, example_inputs, residual))


class _Same:
    """Equal to another one of the very same object, which it does not keep alive."""

    __slots__ = ("_ref",)

    def __init__(self, value: Any) -> None:
        self._ref = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        mine = self._ref()
        return mine is not None and isinstance(other, _Same) and mine is other._ref()


class _Unclear(Exception):
    """A value about which nothing can be said."""


def fingerprint(model: nn.Module) -> tuple[Any, ...] | None:
    """Everything that a trace of the model depends on, to be compared with `==`; None where that
    cannot be told. Names, types and plain attributes of modules, their hooks, and parameters and
    buffers by identity, shape, strides, dtype and device; buffers of a single number also by value.
    """
    modules = list(model.modules())
    seen = _Seen(modules)
    try:
        found = [tuple(seen.module(module)) for module in modules]
    except _Unclear:
        return None
    ambient = (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
    return (*ambient, *found)


class _Seen:
    """Describes the parts of a model, given its modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = {id(module): i for i, module in enumerate(modules)}
        stores = (store for m in modules for store in (m._parameters, m._buffers))
        self.tensors = {id(tensor) for store in stores for tensor in store.values()}
        self.kinds: dict[type, tuple[Any, ...]] = {}

    def module(self, module: nn.Module) -> Iterator[Any]:
        """One module, apart from the modules in it."""
        kind = type(module)
        if kind not in self.kinds:
            self.kinds[kind] = tuple(_shared(kind))
            yield self.kinds[kind]
        yield kind
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                yield name
                if tensor is not None:
                    yield from self.tensor(tensor)
                    if _may_steer(store is module._buffers, name, tensor):
                        yield tensor.item()
        for name, child in module._modules.items():
            yield name
            yield None if child is None else self.modules[id(child)]
        for name, value in vars(module).items():
            if name in APART or (type(value) is OrderedDict and not value):
                continue  # no hooks of this kind
            yield name
            yield value if type(value) in PLAIN else self.value(value, DEPTH)

    def tensor(self, tensor: Tensor) -> Iterator[Any]:
        """A parameter or buffer."""
        yield from (_Same(tensor), type(tensor), tensor.shape, tensor.dtype, tensor.device)
        yield tensor.stride() if tensor.layout == torch.strided else tensor.layout

    def value(self, value: Any, depth: int) -> Any:
        """An attribute, or part of one."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if depth == 0:
            raise _Unclear
        if isinstance(value, (list, tuple, set, frozenset)):
            return (kind, *(self.value(item, depth - 1) for item in value))
        if isinstance(value, dict):
            items = (part for item in value.items() for part in item)
            return (kind, *(self.value(part, depth - 1) for part in items))
        if isinstance(value, nn.Module) and id(value) in self.modules:
            return ("module", self.modules[id(value)])
        if isinstance(value, Tensor) and id(value) in self.tensors:
            return _Same(value)
        if isinstance(value, weakref.ref):
            return (kind, self.value(value(), depth - 1))
        if isinstance(value, (type, enum.Enum)):
            return value
        return self.code(value, depth)

    def code(self, value: Any, depth: int) -> Any:
        """A function, or an object that holds nothing but values."""
        kind = type(value)
        if isinstance(value, types.FunctionType):
            try:
                cells = [cell.cell_contents for cell in value.__closure__ or ()]
            except ValueError as error:  # a cell that is still empty
                raise _Unclear from error
            parts = [*cells, value.__defaults__, value.__kwdefaults__]
            return (_Same(value), *(self.value(part, depth - 1) for part in parts))
        if isinstance(value, types.BuiltinFunctionType):
            if isinstance(value.__self__, (type, types.ModuleType, type(None))):
                return value
            raise _Unclear
        if isinstance(value, types.MethodType):
            return tuple(self.value(part, depth - 1) for part in (value.__self__, value.__func__))
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            return (kind, *(self.value(part, depth - 1) for part in parts))
        plain = is_dataclass(value) or isinstance(value, types.SimpleNamespace)
        if plain and hasattr(value, "__dict__"):
            return (kind, self.value(vars(value), depth - 1))
        raise _Unclear


def _may_steer(is_buffer: bool, name: str, tensor: Tensor) -> bool:
    """Whether the network's code may well ask for this tensor's value to decide what to do."""
    single = is_buffer and tensor.numel() == 1 and name not in STATISTICS
    return single and tensor.layout == torch.strided and tensor.device.type != "meta"


def _shared(kind: type) -> Iterator[Any]:
    """What all modules of a class share: its functions, and plain attributes of the class."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType):
                yield from (name, _Same(value))
            elif type(value) in PLAIN:
                yield from (name, value)
