"""`save` and `load`: one file with the tensors, the plan and the slim model's structure; no pickled
code.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .archives import read_tensors, write_tensors
from .documents import brief, check_fields, mapping_of, short, text, whole
from .errors import ArgumentError, FileFormatError, PlanError
from .inputs import misplaced, unwrap
from .planning.pruning_plan import PruningPlan
from .sharding import refuse_sharded
from .slimming.schema import check_places
from .slimming.slim import SlimInfo, rebuild
from .slimming.structure import Structure

FORMAT = "polarfast-model"
VERSION = 1
_ADVICE = "save it again or take a copy"
_FIELDS = {
    "format": text,
    "version": whole(VERSION, VERSION),
    "plan": text,
    "info": text,
    "tensors": mapping_of(lambda value: isinstance(value, torch.Tensor)),
}


def save(slim: nn.Module, plan: PruningPlan, path: str | os.PathLike[str]) -> None:
    """Write a slim model: its tensors, its plan and its structure, atomically (a crash leaves the
    old file or none).

    Args:
        slim: a model made by `slim` or `load`, fine-tuned or not; data-parallel and compiled
            wrappers are looked through.
        plan: its plan.
        path: the file. It is read back with `load`, which runs no code from it
            (`torch.load(weights_only=True)`).

    Raises:
        FileFormatError: `slim` was not made by polarfast.
        ArgumentError: `slim` is sharded or no model, `plan` no plan.
    """
    if not isinstance(slim, nn.Module) or not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"pf.save(slim, plan, path) was given a {type(slim).__name__} and a "
            f"{type(plan).__name__}: the slim model comes first, then its plan"
        )
    slim = unwrap(slim)
    refuse_sharded(slim)
    info = getattr(slim, "polarfast_info", None)
    if not isinstance(info, SlimInfo):
        inside = [n for n, module in slim.named_modules() if hasattr(module, "polarfast_info")]
        raise FileFormatError(
            "this model was not made by polarfast.slim or polarfast.load"
            + (
                f", but what it holds as its .{inside[0]} was: save that (model.{inside[0]})"
                if inside
                else ". Of a fused one, save the slim model that went into it: pf.fuse(pf.load("
                "path, build), x) makes it again. Any other: torch.save(model.state_dict(), path)"
            )
        )
    folder = Path(path).parent
    if not folder.is_dir():
        raise ArgumentError(
            f"path={os.fspath(path)!r}: there is no folder '{folder}'; make it first"
        )
    data = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.to_json(),
        "info": info.to_json(),
        "tensors": _tensors(slim, info.structure),
    }
    write_tensors(Path(path), data)


def load(path: str | os.PathLike[str], build: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a saved slim model.

    Args:
        path: a file written by `save`.
        build: makes the *original* network, e.g. ``lambda: torchvision.models.resnet50()``; its
            weights do not matter.

    Returns:
        The slim model on the device and in the mode in which `build` made the network.

    Raises:
        ArgumentError: `build` is a network, not a function that makes one.
        FileFormatError: not a polarfast file, damaged, or of a newer version.
        PlanError: `build` makes another network than the one that was pruned.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise ArgumentError(
            f"pf.load(path, build) was given a {type(build).__name__} as build: give a function "
            "that makes the original network, as build=Net or build=lambda: Net(10), since its "
            "layers are cut to the sizes in the file"
        )
    data = _read(path)
    tensors = data["tensors"]
    try:
        info = SlimInfo.from_json(data["info"], os.path.getsize(path))
        _check_shapes(tensors, info.structure)
    except ValueError as error:
        raise FileFormatError(f"'{path}' is damaged ({error}); {_ADVICE}") from error
    names, built = list(tensors), unwrap(build())
    try:
        return _fill(rebuild(built, info), tensors, info.structure)
    except PlanError as error:
        if why := misplaced(names, built):
            why = f"build() makes another network than the one saved{why}"
        raise PlanError(f"'{path}': {why or error}") from error


def _check_shapes(tensors: Mapping[str, torch.Tensor], structure: Structure) -> None:
    """Before any tensor of a shape that the structure states is made."""
    for name, shape in structure.shapes.items():
        if name not in tensors or list(tensors[name].shape) != shape:
            raise ValueError(f"no tensor {short(name)} of shape {short(str(shape))} is in it")


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], structure: Structure) -> nn.Module:
    """A model of the slim form with the tensors of the file, which are taken out of `tensors`."""
    state = model.state_dict(keep_vars=True)
    for name, change in structure.modules.items():
        if change.put_back is not None:
            full = f"{name}.put_back_index".lstrip(".")
            check_places(tensors[full], change.put_back, full)
    for name, tensor in tensors.items():
        own = state.get(name)
        if own is not None and own.is_floating_point() != tensor.is_floating_point():
            raise PlanError(f"{short(name)} is {tensor.dtype} there, {own.dtype} in the network")
    rest = {name: tensors.pop(name) for name in [*tensors] if _not_in_state(name, state, structure)}
    # Where the model was built, in the dtype that was saved.
    placed = {
        name: tensor.to(state[name].device)
        if name in state and state[name].device.type != "meta"
        else tensor
        for name, tensor in tensors.items()
    }
    try:
        model.load_state_dict(placed, assign=True)
    except RuntimeError as error:
        raise PlanError(
            f"build() makes another network than the one saved: {brief(error)}"
        ) from error
    for name, tensor in rest.items():
        old = model.get_buffer(name)
        old.data = tensor.to(old.device)
    return model


def load_plan(path: str | os.PathLike[str]) -> PruningPlan:
    """The plan in a file written by `save`.

    Raises:
        FileFormatError: as in `load`.
        PlanError: the plan in it is damaged, or of a newer version.
    """
    try:
        return PruningPlan.from_json(_read(path)["plan"])
    except PlanError as error:
        raise PlanError(f"'{path}': {error}") from error


def _tensors(slim: nn.Module, structure: Structure) -> dict[str, torch.Tensor]:
    """The state dict, and buffers outside it (not persistent) whose shape has changed."""
    tensors = dict(slim.state_dict())
    for name, buffer in slim.named_buffers():
        if name in structure.shapes:
            tensors.setdefault(name, buffer.detach())
    return tensors


def _not_in_state(name: str, state: dict[str, Any], structure: Structure) -> bool:
    return name not in state and name in structure.shapes


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    data = read_tensors(path, _ADVICE)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileFormatError(f"'{path}' is not a polarfast model file")
    if data.get("version") != VERSION:
        raise FileFormatError(
            f"'{path}' has format version {short(data.get('version'))}, this polarfast reads "
            f"version {VERSION}: upgrade"
        )
    try:
        return check_fields(data, _FIELDS, "the file")
    except ValueError as error:
        raise FileFormatError(f"'{path}' is damaged ({error}); {_ADVICE}") from error
