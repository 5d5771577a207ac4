"""`slim`: a new, smaller, dense model from a plan."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import double_copy, tensors_of_model
from ..errors import PlanError
from ..folding.fold import fold_constants, new_biases
from ..folding.replay import Fold
from ..inputs import device_of, dtype_of, generate, unwrap
from ..layers import drop_gate, gated_modules, lost_gates
from ..planning.limits import check_fold
from ..planning.pruning_plan import PruningPlan
from ..planning.selection import Selection, can_vanish, is_balanced
from ..tracing.classes import Channels, trace_channels
from .edits import Edits, write_edits
from .optimizer import migrate_optimizer
from .structure import Layout, Structure, structure_of
from .verify import check_slim


@dataclass
class SlimInfo:
    """What a slim model remembers of its making, as its attribute `polarfast_info`.

    Attributes:
        structure: its differences in shape from the original.
        fold: what became of the removed channels' constants.
        inexact: reader's weight name -> why its fold is not exact.
    """

    structure: Structure
    fold: str
    inexact: dict[str, str]

    def after(self, before: "SlimInfo | None") -> "SlimInfo":
        """The same for a model that was itself slim: differences from the first original."""
        if before is None:
            return self
        structure = self.structure.after(before.structure)
        return SlimInfo(structure, self.fold, {**before.inexact, **self.inexact})


def slim(
    model: nn.Module,
    plan: PruningPlan,
    fold: str | None = None,
    verify: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Build the slim model of a plan: same class, same forward, fewer channels, gates multiplied
    into their layers. `model` is untouched.

    Args:
        model: the network the plan was made for, or one built alike (an EMA copy, a newly
            constructed one with weights loaded).
        plan: which channels stay.
        fold: what becomes of the removed channels' constants: "exact", "bias" or "none"; by default
            as planned.
        verify: compare the result with `model` (γ or gates of removed channels zeroed) in float64
            before handing it over.
        optimizer: an optimizer of `model`'s parameters; its groups and state are cut to the slim
            model's, in place and last; gates leave it.

    Returns:
        A new module on the same device, in the same modes, dtypes and memory format, with
        `requires_grad` and hooks as in `model`.

    Raises:
        ArgumentError: an unknown `fold`, or the model is sharded.
        PlanError: the plan does not fit the model; or the optimizer's state cannot be cut (a state
            tensor of another shape than its parameter's, as Adafactor's).
        VerificationError: the slim model does not equal what it claims; nothing was changed.
    """
    fold = plan.fold if fold is None else fold
    check_fold(fold)
    model = unwrap(model)
    channels, choice = _fit(model, plan)
    blueprint = _draw(model, plan, channels, choice, fold)
    if verify:
        # Built in float64, where only the algebra can be wrong.
        double = double_copy(model)
        check_slim(double, blueprint.build(double)[0], plan, fold, blueprint.folded, channels)
    small, edits = blueprint.build(model)
    if optimizer is not None:
        migrate_optimizer(optimizer, model, small, blueprint.layout, edits)
    return small


@dataclass
class _Blueprint:
    """Everything that a slim model is built from, apart from the model."""

    channels: Channels
    folded: Fold
    layout: Layout
    info: SlimInfo

    @torch.no_grad()
    def build(self, model: nn.Module) -> tuple[nn.Module, Edits]:
        """Copy the model with cut tensors in place of the full ones, then give it its structure."""
        tensors = tensors_of_model(model)
        edits = write_edits(model, self.channels, self.folded, self.layout)
        memo: dict[int, Any] = {}
        for name in (*self.layout.changed(), *edits.tensors):
            original = tensors[name]
            cut = edits.tensors.get(name)
            if cut is None:
                cut = self.layout.gather(name, original.detach())
            cut = cut.to(original.dtype)
            if isinstance(original, nn.Parameter):
                cut = nn.Parameter(cut, requires_grad=original.requires_grad)
            memo[id(original)] = cut
        small = copy.deepcopy(model, memo)
        for _, module in list(gated_modules(small)):
            drop_gate(module)
        new = _new_tensors(tensors, self.channels, self.layout, edits, self.info.fold)
        self.info.structure.apply(small, lambda name, old: new[name])
        for param in small.parameters():
            param.grad = None
        before = getattr(model, "polarfast_info", None)
        small.polarfast_info = self.info.after(before)  # type: ignore[assignment]
        return small, edits


def _fit(model: nn.Module, plan: PruningPlan) -> tuple[Channels, Selection]:
    """Trace the model and take over the plan's channels."""
    channels = _channels(model, plan)
    for name, layer in plan.layers.items():
        if name not in channels.layers:
            why = channels.pinned.get(name, f"it has no such scaling factor{lost_gates([name])}")
            raise PlanError(f"the plan does not fit this model: {name} takes no part ({why})")
        if channels.layers[name].numel() != layer.channels:
            raise PlanError(
                f"the plan does not fit this model: {name} has {channels.layers[name].numel()} "
                "channels, the plan says "
                f"{layer.channels}; was the model already pruned?"
            )
    choice = Selection(channels, plan.layers)
    choice.adopt(plan.kept)
    choice.drop_unread(can_vanish(model, channels))
    return channels, choice


def _channels(model: nn.Module, plan: PruningPlan) -> Channels:
    """The model's channels; those that the plan was made with, if it is still the same model."""
    if plan._traced is not None and plan._traced.fits(model):
        return plan._traced.channels
    inputs = generate(plan.inputs, device=device_of(model), dtype=dtype_of(model), seed=0)
    return trace_channels(model, inputs, plan.residual)


def _draw(
    model: nn.Module, plan: PruningPlan, channels: Channels, choice: Selection, fold: str
) -> _Blueprint:
    alive = choice.alive()
    forced = {
        int(channels.layers[name][place])
        for name, layer in plan.layers.items()
        for place in layer.constant
    }
    if fold != plan.fold:  # then only for what keeps groups equal in size
        forced &= {int(label) for rows in channels.balanced for label in rows.flatten()}
    known = plan._folded if plan._traced and plan._traced.channels is channels else None
    if known is not None and known.fits(model, channels, alive, forced, fold):
        folded = known.fold
    else:
        folded = fold_constants(model, channels, choice.kept(), alive, plan.inputs, fold, forced)
    alive |= channels.in_classes(folded.constant)
    stays = channels.graph.mask()
    stays[channels.label[alive]] = True
    if not all(is_balanced(rows, stays) for rows in channels.balanced):
        raise PlanError(
            "the plan leaves the groups of a convolution, or the chunks of a layer, with unequal "
            f"numbers of channels for fold={fold!r}: make the plan anew, with this fold="
        )
    layout = Layout(channels, alive)
    created = new_biases(model, channels, folded)
    lengths = {name: int(stays[labels].sum()) for name, labels in created.items()}
    structure = structure_of(layout, model, lengths)
    return _Blueprint(channels, folded, layout, SlimInfo(structure, fold, folded.notes()))


def _new_tensors(
    tensors: dict[str, Tensor], channels: Channels, layout: Layout, edits: Edits, fold: str
) -> dict[str, Tensor]:
    """Created biases, and what norms need to put their channels back."""
    new: dict[str, Tensor] = {}
    for name, values in edits.biases.items():
        like = tensors[f"{name.removesuffix('bias')}weight"]
        new[name] = values.to(like.device, like.dtype)
    for weight in channels.boundaries:
        norm = channels.calls[weight]
        alive = layout.alive[norm.inputs]
        gamma, prefix = tensors[weight], weight.rpartition(".")[0]
        constant = torch.zeros_like(gamma)
        if fold != "none" and norm.bias is not None and norm.gate is None:
            constant = torch.where(alive.to(gamma.device), constant, tensors[norm.bias].detach())
        new[f"{prefix}.put_back_index"] = alive.nonzero().flatten().to(gamma.device)
        new[f"{prefix}.put_back_constant"] = constant.detach().clone()
    return new
