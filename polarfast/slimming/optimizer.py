"""An optimizer's groups and state, cut from a model's parameters to its slim model's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..layers import gate_name, gated_modules
from .structure import Layout, fill_

#: Tensor name -> dimensions, and which of the kept positions along each start anew.
Blank = Mapping[str, Sequence[tuple[int, Tensor]]]


@torch.no_grad()
def migrate_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    layout: Layout,
    blank: Blank,
) -> None:
    """Point every parameter group at the slim parameters and cut every state tensor with them, in
    place.

    Created biases join the group of the weight beside them, gates are left out. Parameters of other
    models are left alone.

    Raises:
        PlanError: it holds none of the model's parameters, or a state tensor has neither its
            parameter's shape nor a single element; the optimizer is unchanged.
    """
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    held = [param for group in optimizer.param_groups for param in group["params"]]
    if held and not any(param in names for param in held):
        raise PlanError(
            f"the optimizer has none of this model's parameters; its first is one of shape "
            f"{tuple(held[0].shape)} of another model. It was made from a copy, or before the "
            "parameters were replaced: give the one that trains this model, or none"
        )
    slim_params = dict(small.named_parameters())
    gates = {gate_name(name) for name, _ in gated_modules(model)}
    created = [name for name in slim_params if name not in set(names.values())]
    groups: list[list[nn.Parameter]] = []
    found_names: list[list[str]] = []
    for group in optimizer.param_groups:
        params = [
            slim_params[names[param]] if param in names else param
            for param in group["params"]
            if names.get(param) not in gates
        ]
        mine = {names[param] for param in group["params"] if param in names}
        added = [name for name in created if f"{name.removesuffix('bias')}weight" in mine]
        params += [slim_params[name] for name in added]
        groups.append(params)
        found_names.append(added)
    state: dict[Tensor, Any] = {}
    for param, values in optimizer.state.items():
        name = names.get(param)
        if name is None:
            state[param] = values
        elif name not in gates:
            state[slim_params[name]] = {
                key: _cut(name, param, key, value, layout, blank) for key, value in values.items()
            }
    for group, params, added in zip(optimizer.param_groups, groups, found_names, strict=True):
        if "param_names" in group:
            left = [
                given
                for param, given in zip(group["params"], group["param_names"], strict=True)
                if names.get(param) not in gates
            ]
            group["param_names"] = [*left, *added]
        group["params"] = params
    optimizer.state.clear()
    optimizer.state.update(state)


def _cut(name: str, param: Tensor, key: str, value: Any, layout: Layout, blank: Blank) -> Any:
    untouched = not layout.index(name) and name not in blank
    if not isinstance(value, Tensor) or value.dim() == 0 or untouched:
        return value
    if value.shape != param.shape:
        raise PlanError(
            f"the optimizer's state {key!r} of {name} has shape {tuple(value.shape)}, the "
            f"parameter {tuple(param.shape)}: this "
            "optimizer's state cannot be cut; call slim without optimizer= and make a new one"
        )
    cut = layout.gather(name, value) if layout.index(name) else value.clone()
    for dim, places in blank.get(name, ()):
        fill_(cut, dim, places, 0.0)
    return cut
