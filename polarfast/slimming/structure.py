"""The shape of a slim model, apart from its numbers: which positions of every tensor stay, and what
is enough to rebuild it from the original constructor.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import tensors_of_model
from ..documents import check_fields, list_of, mapping_of, one_of, optional, short, truth, whole
from ..errors import PlanError
from ..kernels.gather import gather_channels
from ..layers import SILENT, PutBack, put_back_type
from ..tracing.classes import Channels
from ..tracing.graph import ProjectionCall

#: Kind of module -> the sizes that it keeps beside its tensors.
SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.conv._ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.RNNBase: ("input_size",),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.PReLU: ("num_parameters",),
}
_KNOWN = one_of(*(name for names in SIZES.values() for name in names))
_SIZE = whole(0, 2**40)
_STRUCTURE = {
    "shapes": mapping_of(lambda shape: list_of(_SIZE)(shape) and len(shape) <= 64),
    "modules": mapping_of(lambda change: isinstance(change, dict)),
}
_CHANGE = {
    "attributes": lambda sizes: mapping_of(_SIZE)(sizes) and all(map(_KNOWN, sizes)),
    "put_back": optional(_SIZE),
    "silent": truth,
    "bias": truth,
}


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
        """The inverse of `to_data`.

        Raises:
            ValueError: this is no such data. Whether it fits a model, `check_info` says.
        """
        check_fields(data, _STRUCTURE, "the structure")
        for name, change in data["modules"].items():
            check_fields(change, _CHANGE, f"what changes in module {short(name)}")
        modules = {name: ModuleChange(**change) for name, change in data["modules"].items()}
        return cls(shapes=dict(data["shapes"]), modules=modules)

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
        changed = {name: module_of(model, name) for name in self.modules}
        for name, change in self.modules.items():
            self._change(changed[name], name, change, tensor_of)
        for name, (module, attribute) in targets.items():
            old = getattr(module, attribute)
            if list(old.shape) != self.shapes[name]:
                _replace(model, old, tensor_of(name, old))
        for module in changed.values():
            if isinstance(module, nn.RNNBase):  # it keeps its weights in a list, too
                names = module._flat_weights_names
                module._flat_weights = [getattr(module, name) for name in names]

    def _change(
        self,
        module: nn.Module,
        name: str,
        change: ModuleChange,
        tensor_of: Callable[[str, Tensor | None], Tensor],
    ) -> None:
        for attribute, size in change.attributes.items():
            setattr(module, attribute, size)
        if change.put_back is not None or change.silent:
            puts_back = change.put_back is not None
            variant = put_back_type(module) if puts_back else SILENT.get(type(module))
            if variant is None:
                raise PlanError(
                    f"{name} is a {type(module).__name__}, but the plan was made for a plain "
                    "torch layer there"
                )
            # The class alone changes: parameters, hooks, modes stay with the instance.
            module.__class__ = variant
        if change.put_back is None and not change.bias:
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        prefix = f"{name}." if name else ""
        if change.put_back is not None:
            index = tensor_of(f"{prefix}put_back_index", None).to(weight.device)
            constant = tensor_of(f"{prefix}put_back_constant", None).to(weight.device)
            module.hold(index, constant)  # type: ignore[operator]
        if change.bias:
            bias = tensor_of(f"{prefix}bias", None).to(weight.device, weight.dtype)
            module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        PlanError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"the plan changes a module {short(name)} that this model has not: is it the model the "
            "plan was made for?"
        ) from error


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, attribute = name.rpartition(".")
    return module_of(model, prefix), attribute


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


class Layout:
    """The slim model's sizes, given the channels that stay.

    Attributes:
        alive: bool [graph.count], the ids that stay (a constant channel stays).
    """

    def __init__(self, channels: Channels, alive: Tensor) -> None:
        self.channels, self.graph, self.alive = channels, channels.graph, alive
        self._index: dict[str, dict[int, Tensor]] = {}
        gates = self.graph.gate_names()  # no slim model has any
        lost = channels.axes.counts(~alive).tolist()
        for ((name, dim), ids), gone in zip(self.graph.axes.items(), lost, strict=True):
            if gone and name not in gates:
                kept = alive[ids].nonzero()[:, -1]
                # Groups keep as many positions each, but not the same ones.
                index = kept.view(len(ids), -1) if ids.dim() == 2 else kept
                self._index.setdefault(name, {})[dim] = index

    def index(self, name: str) -> dict[int, Tensor]:
        """Dimension -> positions kept, for the dimensions of a tensor that lose any; [groups, n]
        where each group of rows keeps others.
        """
        return self._index.get(name, {})

    def places(self, name: str, dim: int, mask: Tensor) -> Tensor:
        """A mask over a tensor's positions along a dimension ([groups, n] where each group of rows
        has its own), cut to those that stay.
        """
        index = self.index(name).get(dim)
        if index is None:
            return mask
        return mask.gather(1, index) if index.dim() == 2 else mask[index]

    def changed(self) -> list[str]:
        """Names of all tensors that lose positions."""
        return list(self._index)

    def shape(self, name: str, tensor: Tensor) -> list[int]:
        """The shape in the slim model of the tensor of that name."""
        shape = list(tensor.shape)
        for dim, kept in self.index(name).items():
            shape[dim] = kept.shape[-1]
        return shape

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """The kept positions of a tensor shaped like the one of that name."""
        index = self.index(name)
        if 1 in index and index[1].dim() == 2:
            blocks = tensor.chunk(len(index[1]))
            pairs = zip(blocks, index[1], strict=True)
            tensor = torch.cat([gather_channels(block, None, kept) for block, kept in pairs])
            index = {dim: kept for dim, kept in index.items() if dim != 1}
        if index.keys() & {0, 1}:
            tensor = gather_channels(tensor, index.get(0), index.get(1))
        for dim in index.keys() - {0, 1}:
            tensor = tensor.index_select(dim, index[dim].to(tensor.device))
        return tensor

    def sizes(self, call: ProjectionCall) -> tuple[int, int]:
        """Input and output channels of a call that stay."""
        return int(self.alive[call.inputs].sum()), int(self.alive[call.outputs].sum())


def structure_of(layout: Layout, model: nn.Module, biases: Mapping[str, int]) -> Structure:
    """The slim model's shape, as data.

    Args:
        model: the original.
        biases: name -> length of those to create.
    """
    tensors = tensors_of_model(model)
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
    elif isinstance(module, nn.RNNBase):  # hidden sizes stay
        change.attributes = {"input_size": n_in}


def _write_norm(
    layout: Layout, structure: Structure, model: nn.Module, name: str, boundary: bool, ids: Tensor
) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    change = _change_of(structure, name)
    kept = int(layout.alive[ids].sum())
    if isinstance(module, nn.modules.batchnorm._NormBase):
        change.attributes = {"num_features": kept}
    if boundary:
        before = module.put_back_constant if isinstance(module, PutBack) else ids
        change.put_back = before.numel()
        prefix = name.rpartition(".")[0]
        structure.shapes[f"{prefix}.put_back_index"] = [kept]
        structure.shapes[f"{prefix}.put_back_constant"] = [before.numel()]
    else:
        change.silent = kept == 0


def _change_of(structure: Structure, tensor_name: str) -> ModuleChange:
    return structure.modules.setdefault(tensor_name.rpartition(".")[0], ModuleChange())


def fill_(tensor: Tensor, dim: int, places: Tensor, value: float) -> None:
    """Set positions along a dimension, which may differ between groups of rows
    (bool, [groups, n]), in place."""
    rows = places if places.dim() == 2 else places.unsqueeze(0)
    for block, row in zip(tensor.chunk(len(rows)), rows, strict=True):
        block.index_fill_(dim, row.nonzero().flatten().to(tensor.device), value)
