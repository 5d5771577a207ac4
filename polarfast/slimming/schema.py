"""Whether what a file says of a slim model can be true of the model that was built for it."""

from collections.abc import Mapping

import torch
from torch import nn

from ..documents import short
from ..errors import PlanError
from ..layers import TRANSPOSED, can_put_back
from .origin import Origin
from .structure import SIZES, ModuleChange, Structure, module_of

Shapes = dict[str, list[int]]


def check_info(structure: Structure, origin: Origin | None, model: nn.Module) -> None:
    """Hold a slim model's structure, and its way back, against the original; nothing is allocated.

    Raises:
        PlanError: the model has no such module or tensor, or one that cannot have become what the
            structure says.
    """
    stated: dict[str, Shapes] = {name: {} for name in structure.modules}
    for name, shape in structure.shapes.items():
        prefix, _, own = name.rpartition(".")
        stated.setdefault(prefix, {})[own] = shape
    originals: dict[str, torch.Size] = {}
    for name, shapes in stated.items():
        module = module_of(model, name)
        change = structure.modules.get(name, ModuleChange())
        old = {
            own: tensor.shape
            for store in (module._parameters, module._buffers)
            for own, tensor in store.items()
            if tensor is not None
        }
        new = _new_shapes(
            name, module, change, {own: [*shape] for own, shape in old.items()} | shapes
        )
        for own, shape in shapes.items():
            full = f"{name}.{own}" if name else own
            if own in new:
                if shape != new[own]:
                    raise _misfit(full, f"of shape {short(str(shape))}")
            elif own not in old:
                raise _misfit(full, "there")
            elif len(shape) != len(old[own]) or any(map(int.__gt__, shape, old[own])):
                raise _misfit(full, f"of shape {short(str(shape))}, from {list(old[own])}")
            else:
                originals[full] = old[own]
        if missing := [own for own in new if own not in shapes]:
            raise _misfit(name, f"without a shape of {missing[0]}")
    if origin is not None:
        _check_origin(structure, origin, originals)


def check_places(index: torch.Tensor, width: int, name: str) -> None:
    """Hold the places that a norm puts its channels back at against its width.

    Raises:
        PlanError: they are no ascending whole numbers below the width.
    """
    if (
        index.dtype != torch.long
        or bool((index[1:] <= index[:-1]).any())
        or (index.numel() and not 0 <= int(index[0]) <= int(index[-1]) < width)
    ):
        raise PlanError(f"{short(name)} holds no ascending places below {width}")


def _new_shapes(prefix: str, module: nn.Module, change: ModuleChange, shapes: Shapes) -> Shapes:
    """Of the tensors that the change makes, given the shapes of all; the rest is compared here."""
    kind = type(module).__name__
    known = next((names for base, names in SIZES.items() if isinstance(module, base)), ())
    sizes = {name: getattr(module, name) for name in known}
    for name, size in change.attributes.items():
        if name not in sizes or size > sizes[name]:
            here = f": it is {sizes[name]}" if name in sizes else ""
            raise _misfit(f"{prefix}.{name}".lstrip("."), f"{short(size)} in a {kind}{here}")
    sizes |= change.attributes
    if change.attributes:
        for name, size in _sizes(module, shapes, sizes).items():
            if size != sizes[name]:
                what = f"{sizes[name]} in a {kind}, its tensors are for {size}"
                raise _misfit(f"{prefix}.{name}".lstrip("."), what)
    new: Shapes = {}
    if change.put_back is not None:
        width = module.num_features if can_put_back(module) else None
        if change.put_back != width:
            raise _misfit(f"a {kind}", f"one that puts back {change.put_back} channels")
        new = {"put_back_index": [sizes["num_features"]], "put_back_constant": [change.put_back]}
    elif change.silent and 0 not in sizes.values():
        raise _misfit(f"a {kind} of {sizes}", "one without channels")
    if change.bias:
        width = sizes.get("out_channels", sizes.get("out_features"))
        if width is None or module._parameters.get("bias") is not None:
            raise _misfit(f"a {kind}", "one with a new bias")
        new["bias"] = [width]
    return new


def _sizes(module: nn.Module, shapes: Shapes, sizes: Mapping[str, int]) -> dict[str, int]:
    """What the sizes beside the tensors must be, by the tensors' shapes."""
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = shapes["weight"][0], shapes["weight"][1] * sizes["groups"]
        if isinstance(module, TRANSPOSED):
            return {"in_channels": rows, "out_channels": columns}
        return {"in_channels": columns, "out_channels": rows}
    if isinstance(module, nn.Linear):
        return {"in_features": shapes["weight"][1], "out_features": shapes["weight"][0]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": shapes["weight_ih_l0"][1]}
    own = ("weight", "bias", "running_mean", "running_var")
    found = {shapes[name][0] for name in own if name in shapes}
    name = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    return {name: found.pop() if len(found) == 1 else -1}


def _check_origin(
    structure: Structure, origin: Origin, originals: Mapping[str, torch.Size]
) -> None:
    """Positions within the original's tensors, and names of tensors that are there."""
    for name, kept in origin.index.items():
        if name not in originals:
            raise _misfit(name, "cut")
        for dim, places in kept.items():
            rows, most = len(places) if places.dim() == 2 else 1, originals[name][dim]
            past = bool(places.numel()) and int(places.max()) >= most
            if past or rows > 1 and (dim == 0 or originals[name][0] % rows):
                raise _misfit(name, f"cut to positions of more than {most}")
    constants = set(origin.put_back.values())
    if lost := [*({*origin.ones, *origin.put_back} - originals.keys())]:
        raise _misfit(lost[0], "cut")
    if lost := [*({*origin.created, *constants} - structure.shapes.keys())]:
        raise _misfit(lost[0], "there")


def _misfit(name: str, what: str) -> PlanError:
    return PlanError(
        f"build() makes another network than the one that was saved: {short(name)} cannot be {what}"
    )
