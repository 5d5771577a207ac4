"""The shape of a slim model, apart from its numbers: enough to rebuild it from the original
constructor.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..layers import PUT_BACK, SILENT
from ..planning.layout import Layout
from ..tracing.graph import ProjectionCall


@dataclass
class ModuleChange:
    """What differs in one module.

    Attributes:
        attributes: sizes that the module keeps beside its tensors (`in_channels`, `groups`,
            `num_features`, …).
        put_back: output width, where the module's channels are put back at their places.
        silent: the module has no channels at all.
        bias: a bias is created.
    """

    attributes: dict[str, int] = field(default_factory=dict)
    put_back: int | None = None
    silent: bool = False
    bias: bool = False


@dataclass
class Structure:
    """Differences in shape between a slim model and the original.

    Attributes:
        shapes: tensor name -> shape, of every parameter and buffer that is new or has another
            shape.
        modules: module name -> what differs.
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    modules: dict[str, ModuleChange] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Structure":
        """The inverse of `to_data`."""
        modules = {name: ModuleChange(**change) for name, change in data["modules"].items()}
        return cls(
            shapes={name: list(shape) for name, shape in data["shapes"].items()}, modules=modules
        )

    def after(self, first: "Structure") -> "Structure":
        """The difference when this one follows another (a slim model slimmed again)."""
        modules = {name: replace(change) for name, change in first.modules.items()}
        for name, change in self.modules.items():
            old = modules.get(name, ModuleChange())
            modules[name] = ModuleChange(
                attributes={**old.attributes, **change.attributes},
                put_back=old.put_back if change.put_back is None else change.put_back,
                silent=old.silent or change.silent,
                bias=old.bias or change.bias,
            )
        return Structure({**first.shapes, **self.shapes}, modules)

    def apply(self, model: nn.Module, tensor_of: Callable[[str, Tensor | None], Tensor]) -> None:
        """Give a model built like the original (or a copy of it) this structure, in place.

        Args:
            model: the model to change.
            tensor_of: makes the tensor for a name of `shapes`, given the one that stands there now
                (None: a new one).

        Raises:
            PlanError: the model has no such module or tensor.
        """
        targets = {name: _owner(model, name) for name in self.shapes}
        changed = {name: _module(model, name) for name in self.modules}
        for name, change in self.modules.items():
            self._change(changed[name], name, change, tensor_of)
        for name, (module, attribute) in targets.items():
            old = getattr(module, attribute)
            if list(old.shape) != self.shapes[name]:
                _replace(model, old, tensor_of(name, old))

    def _change(
        self,
        module: nn.Module,
        name: str,
        change: ModuleChange,
        tensor_of: Callable[[str, Tensor | None], Tensor],
    ) -> None:
        for attribute, size in change.attributes.items():
            setattr(module, attribute, size)
        table = PUT_BACK if change.put_back is not None else SILENT if change.silent else None
        if table is not None:
            if type(module) not in table:
                raise PlanError(
                    f"{name} is a {type(module).__name__}, but the plan was made for a plain "
                    "torch layer there"
                )
            # The class alone changes: parameters, hooks, modes stay with the instance.
            module.__class__ = table[type(module)]
        if change.put_back is None and not change.bias:
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        prefix = f"{name}." if name else ""
        if change.put_back is not None:
            index = tensor_of(f"{prefix}put_back_index", None).to(weight.device)
            constant = tensor_of(f"{prefix}put_back_constant", None).to(weight.device)
            module.put_back(index, constant)  # type: ignore[operator]
        if change.bias:
            bias = tensor_of(f"{prefix}bias", None).to(weight.device, weight.dtype)
            module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"the plan changes a module {name!r} that this model has not: is it the model the "
            "plan was made for?"
        ) from error


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, attribute = name.rpartition(".")
    return _module(model, prefix), attribute


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put `new` wherever `old` stands; tied tensors stay tied."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for attribute, tensor in store.items():
                if tensor is old:
                    store[attribute] = new  # type: ignore[assignment]


def blank(shapes: Mapping[str, list[int]]) -> Callable[[str, Tensor | None], Tensor]:
    """Tensors to be filled by `load_state_dict`."""

    def make(name: str, old: Tensor | None) -> Tensor:
        if name.endswith("put_back_index"):
            return torch.zeros(shapes[name], dtype=torch.long, device="cpu")
        return (
            torch.zeros(shapes[name], device="cpu") if old is None else old.new_zeros(shapes[name])
        )

    return make


def structure_of(layout: Layout, model: nn.Module, biases: Mapping[str, int]) -> Structure:
    """The slim model's shape, as data.

    Args:
        model: the original.
        biases: name -> length of those to create.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    structure = Structure()
    for name in layout.changed():
        structure.shapes[name] = layout.shape(name, tensors[name])
    for name, length in biases.items():
        structure.shapes[name] = [length]
        _change_of(structure, name).bias = True
    for call in layout.graph.projections:
        _write_projection(layout, structure, model, call)
    for norm in layout.graph.norms:
        norm_name = norm.weight or norm.mean or ""
        if norm_name in structure.shapes:
            boundary = norm.scale in layout.channels.boundaries
            _write_norm(layout, structure, model, norm_name, boundary, norm.inputs)
    for name in structure.shapes:
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.PReLU):
            _change_of(structure, name).attributes["num_parameters"] = structure.shapes[name][0]
    return structure


def _write_projection(
    layout: Layout, structure: Structure, model: nn.Module, call: ProjectionCall
) -> None:
    module = model.get_submodule(call.weight.rpartition(".")[0])
    n_in, n_out = layout.sizes(call)
    if n_in == call.inputs.numel() and n_out == call.outputs.numel():
        return
    change = _change_of(structure, call.weight)
    change.silent = not (n_in and n_out)
    if isinstance(module, nn.modules.conv._ConvNd):
        change.attributes = {"in_channels": n_in, "out_channels": n_out}
        if call.depthwise:
            change.attributes["groups"] = n_in
    elif isinstance(module, nn.Linear):
        change.attributes = {"in_features": n_in, "out_features": n_out}


def _write_norm(
    layout: Layout, structure: Structure, model: nn.Module, name: str, boundary: bool, ids: Tensor
) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    change = _change_of(structure, name)
    kept = int(layout.alive[ids].sum())
    if isinstance(module, nn.modules.batchnorm._NormBase):
        change.attributes = {"num_features": kept}
    if boundary:
        change.put_back = ids.numel()
        prefix = name.rpartition(".")[0]
        structure.shapes[f"{prefix}.put_back_index"] = [kept]
        structure.shapes[f"{prefix}.put_back_constant"] = [ids.numel()]
    else:
        change.silent = kept == 0


def _change_of(structure: Structure, tensor_name: str) -> ModuleChange:
    return structure.modules.setdefault(tensor_name.rpartition(".")[0], ModuleChange())
