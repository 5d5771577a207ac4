"""`slim`: a new, smaller, dense model from a plan."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import copy_of, double_copy, tensors_of_model
from ..documents import check_fields, mapping_of, one_of, optional, parse_json, text
from ..errors import ArgumentError, PlanError
from ..folding.fold import FOLDS, check_fold, fold_constants, new_biases
from ..folding.replay import Fold, shift_of
from ..inputs import Inputs, check_spec, device_of, dtype_of, misplaced, unwrap
from ..kernels.gather import gather_channels
from ..layers import drop_gate, gate_name, gated_modules, lost_gates, multiply_outputs
from ..planning.pruning_plan import PruningPlan
from ..planning.remarks import MASS, removed
from ..planning.selection import Selection, can_vanish, is_balanced
from ..tracing.classes import Channels, trace_channels
from ..tracing.graph import ProjectionCall
from ..tracing.meaning import divided
from .checking import check_slim
from .optimizer import migrate_optimizer
from .origin import Origin
from .schema import check_info
from .structure import Layout, Structure, blank, fill_, structure_of

_INFO = {
    "structure": lambda value: isinstance(value, dict),
    "fold": one_of(*FOLDS),
    "inexact": mapping_of(text),
    "origin": optional(lambda value: isinstance(value, dict)),
    "inputs": lambda value: isinstance(value, dict),
}


@dataclass
class SlimInfo:
    """What a slim model remembers of its making, as its attribute `polarfast_info`.

    Attributes:
        structure: its differences in shape from the original.
        fold: what became of the removed channels' constants.
        inexact: reader's weight name -> why its fold is not exact.
        origin: where its tensors' positions lie in the original; None where that was not kept.
        inputs: description of the plan's example inputs (JSON data); empty where that was not kept.
    """

    structure: Structure
    fold: str
    inexact: dict[str, str]
    origin: Origin | None = None
    inputs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text."""
        data = {
            "structure": self.structure.to_data(),
            "fold": self.fold,
            "inexact": self.inexact,
            "origin": None if self.origin is None else self.origin.to_data(),
            "inputs": self.inputs,
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str, beside: int = 0) -> "SlimInfo":
        """The inverse of `to_json`.

        Args:
            beside: bytes of the file that the text is from.

        Raises:
            ValueError: the text is damaged.
        """
        data = parse_json(text, beside)
        check_fields(data, _INFO, "what the slim model remembers", ("origin", "inputs"))
        inputs = data.get("inputs", {})
        check_spec(inputs)
        known = data.get("origin")
        structure = Structure.from_data(data["structure"])
        origin = None if known is None else Origin.from_data(known, structure.shapes)
        return cls(structure, data["fold"], data["inexact"], origin, inputs)

    def after(self, before: "SlimInfo | None") -> "SlimInfo":
        """The same for a model that was itself slim: differences from the first original."""
        if before is None:
            return self
        origin = None
        if self.origin is not None and before.origin is not None:
            origin = self.origin.after(before.origin)
        structure = self.structure.after(before.structure)
        inexact = {**before.inexact, **self.inexact}
        return SlimInfo(structure, self.fold, inexact, origin, self.inputs)


def slim(
    model: nn.Module,
    plan: PruningPlan,
    fold: str | None = None,
    verify: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    inputs: Any = None,
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
        inputs: example inputs as for `plan`, needed for a plan that was read from a file where the
            network takes tensors whose values have a meaning (indices, lengths, masks).

    Returns:
        A new module on the same device, in the same modes, dtypes and memory format, with
        `requires_grad` and hooks as in `model`.

    Raises:
        ArgumentError: an unknown `fold`, or the model is sharded.
        PlanError: the plan does not fit the model; or the optimizer's state cannot be cut (a state
            tensor of another shape than its parameter's, as Adafactor's).
        VerificationError: the slim model does not equal what it claims; nothing was changed.
    """
    if isinstance(model, PruningPlan) or not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"pf.slim(model, plan) was given a {type(model).__name__} and a {type(plan).__name__}: "
            "the model comes first, then its plan"
        )
    fold = plan.fold if fold is None else fold
    check_fold(fold)
    model = unwrap(model)
    examples = divided(model, plan.inputs_like(inputs))
    channels, choice = _fit(model, plan, examples)
    _warn_of(plan, model)
    blueprint = _draw(model, plan, channels, choice, fold, examples)
    if verify:
        # Built in float64, where only the algebra can be wrong.
        double = double_copy(model)
        built = blueprint.build(double)[0]
        seen = plan._traced is not None and plan._traced.channels is channels
        check_slim(
            *(double, built, plan, fold, examples, (blueprint.folded, channels)),
            (lambda: _anew(model, double, plan, fold, examples)) if seen else None,
        )
    small, edits = blueprint.build(model)
    for name in channels.graph.unrun:
        small.get_submodule(name).register_forward_pre_hook(refuse_other_width)
    if optimizer is not None:
        migrate_optimizer(optimizer, model, small, blueprint.layout, edits.blank)
    return small


def rebuild(model: nn.Module, info: SlimInfo) -> nn.Module:
    """A model built like the original, changed in place into a slim model's form; its tensors are
    to be loaded.

    Raises:
        PlanError: the model is not built like the original; it is left as it was.
    """
    check_info(info.structure, info.origin, model)
    info.structure.apply(model, blank(info.structure.shapes))
    model.polarfast_info = info  # type: ignore[assignment]
    return model


def info_of(model: nn.Module) -> SlimInfo:
    """What a slim model remembers.

    Raises:
        ArgumentError: the model was not made by polarfast.
    """
    info = getattr(model, "polarfast_info", None)
    if not isinstance(info, SlimInfo):
        raise ArgumentError("this model was not made by pf.slim, pf.shrink or pf.load")
    return info


def refuse_other_width(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before a module that did not run when the network was traced.

    Raises:
        PlanError: it is given another number of channels than it reads.
    """
    for attribute, dim in (("in_channels", 1), ("num_features", 1), ("in_features", -1)):
        wanted = getattr(module, attribute, None)
        if isinstance(wanted, int) and args and isinstance(args[0], Tensor):
            given = args[0].shape[dim]
            if given != wanted:
                raise PlanError(
                    f"this {type(module).__name__} reads {wanted} channels and is given {given}: it"
                    " did not run on the example inputs, so that it was not pruned with what it "
                    "reads. Plan with an example of each use: example_inputs=[(x, 0), (x, 1)]"
                )


def _warn_of(plan: PruningPlan, model: nn.Module) -> None:
    """Say it where nothing is cut, and where γ are no longer those that the plan was made from."""
    slim_already = hasattr(model, "polarfast_info")
    whole = all(plan.kept[name].numel() == layer.channels for name, layer in plan.layers.items())
    if whole and not slim_already:
        warnings.warn(
            "pf.slim: the plan removes no channel, so this is a copy of the model: print(plan) "
            "says why",
            stacklevel=3,
        )
    params = dict(model.named_parameters())
    if plan._traced is None or not plan._traced.fits(model):
        # An EMA copy, the model of a plan from a file, or one that the plan has nothing to do with.
        sizes = {name: params[name].detach().abs() for name in plan.layers if name in params}
        gone, largest, name = removed(plan, sizes)
        # What the plan has said of γ that go, it has said of those that it was made from.
        sizes = {name: gamma.abs() for name, gamma in plan._gammas.items()}
        known = plan.remarks and (not sizes or removed(plan, sizes)[0] > gone - MASS)
        if gone > MASS and not known:
            warnings.warn(
                "pf.slim: in this model, which is not the object that was planned, the channels "
                f"that go hold {gone:.0%} of the sum of |γ| (up to {largest:.2g}, in {name}): is "
                "it trained, and the plan of it?",
                stacklevel=3,
            )
        return
    since = {
        name: float((params[name].detach() - before.to(params[name])).abs().max())
        for name, before in plan._gammas.items()
        if not torch.equal(params[name].detach(), before.to(params[name]))  # moved since, perhaps
    }
    if since:
        name = max(since, key=since.__getitem__)
        warnings.warn(
            f"pf.slim: the γ of {len(since)} layers have changed since the plan was made (by up to "
            f"{since[name]:.2g}, in {name}), so it may remove channels that are used: plan anew",
            stacklevel=3,
        )


#: From a tensor's name, its cut copy to be edited in place.
Editor = Callable[[str], Tensor]


@dataclass
class Edits:
    """Tensors of the slim model that are more than the kept positions of the model's own.

    Attributes:
        tensors: name -> cut tensor (vectors in float64, so that they are rounded once).
        biases: name of a bias to create -> its values, float64.
        blank: tensor name -> dimensions, and which of the kept positions along each (bool,
            [groups, n] where groups of rows differ) have their optimizer state start at 0 (constant
            channels).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    blank: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)


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
        small = copy_of(model, memo)
        for _, module in list(gated_modules(small)):
            drop_gate(module)
        new = _new_tensors(tensors, self.channels, self.layout, edits, self.info.fold)
        self.info.structure.apply(small, lambda name, old: new[name])
        for param in small.parameters():
            param.grad = None
        before = getattr(model, "polarfast_info", None)
        small.polarfast_info = self.info.after(before)  # type: ignore[assignment]
        return small, edits


def _fit(model: nn.Module, plan: PruningPlan, examples: Inputs) -> tuple[Channels, Selection]:
    """Trace the model and take over the plan's channels."""
    channels = _channels(model, plan, examples)
    for name, layer in plan.layers.items():
        if name not in channels.layers:
            why = channels.pinned.get(name, "it has no such scaling factor")
            raise PlanError(
                f"the plan does not fit this model: {name} takes no part ({why})"
                f"{misplaced(plan.layers, model) or lost_gates([name])}"
            )
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


def _anew(
    model: nn.Module, double: nn.Module, plan: PruningPlan, fold: str, examples: Inputs
) -> tuple[nn.Module, tuple[Fold, Channels]]:
    """The slim model in float64, and what was folded, without what the plan saw of the model."""
    forgetful = replace(plan)
    channels, choice = _fit(model, forgetful, examples)
    blueprint = _draw(model, forgetful, channels, choice, fold, examples)
    return blueprint.build(double)[0], (blueprint.folded, channels)


def _channels(model: nn.Module, plan: PruningPlan, examples: Inputs) -> Channels:
    """The model's channels; those that the plan was made with, if it is still the same model."""
    if plan._traced is not None and plan._traced.fits(model):
        return plan._traced.channels
    inputs = examples.make(device=device_of(model), dtype=dtype_of(model), seed=0)
    return trace_channels(model, inputs, plan.residual)


def _draw(
    model: nn.Module,
    plan: PruningPlan,
    channels: Channels,
    choice: Selection,
    fold: str,
    examples: Inputs,
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
        folded = fold_constants(model, channels, choice.kept(), alive, examples, fold, forced)
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
    origin = Origin.of(layout, channels, structure)
    info = SlimInfo(structure, fold, folded.notes(), origin, plan.inputs)
    return _Blueprint(channels, folded, layout, info)


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
        alive = alive.to(gamma.device)
        constant = torch.zeros_like(gamma)
        if fold != "none" and norm.bias is not None and norm.gate is None:
            constant = torch.where(alive, constant, tensors[norm.bias].detach())
        index = alive.nonzero().flatten()
        places = tensors.get(f"{prefix}.put_back_index")
        if places is not None:  # the model is slim already: among what was put back before
            among = tensors[f"{prefix}.put_back_constant"].detach()
            constant, index = among.index_copy(0, places, constant), places[index]
        new[f"{prefix}.put_back_index"] = index.clone()
        new[f"{prefix}.put_back_constant"] = constant.detach().clone()
    return new


# --- the fold, written into the cut tensors


def write_edits(model: nn.Module, channels: Channels, fold: Fold, layout: Layout) -> Edits:
    """The fold's numbers, in a model's own cut tensors."""
    edits = Edits()
    tensors = tensors_of_model(model)

    def edit(name: str) -> Tensor:
        if name not in edits.tensors:
            own = tensors[name].detach()
            cut = layout.gather(name, own) if layout.index(name) else own.clone()
            edits.tensors[name] = cut.double() if cut.dim() < 2 else cut
        return edits.tensors[name]

    means = {norm.mean for norm in channels.graph.norms}
    done: set[str] = set()
    for index, reader in fold.readers.items():
        if not reader.adds or reader.sink is None or reader.sink in done:
            continue  # calls that share a sink agree on what it takes up
        done.add(reader.sink)
        call = channels.graph.projections[index]
        rows = layout.alive[call.outputs].nonzero().flatten()
        shift = shift_of(call, tensors[reader.weight], reader, rows)
        if reader.sink not in tensors:
            edits.biases[reader.sink] = shift
            continue
        sign = -1.0 if reader.sink in means else 1.0
        edit(reader.sink).add_(shift.to(tensors[reader.sink].device), alpha=sign)
    if fold.constant:
        _silence(edits, layout, channels.in_classes(fold.constant), edit)
    for index, reader in fold.readers.items():
        call = channels.graph.projections[index]
        for carrier, (positions, multiple) in reader.columns.items():
            if not bool(layout.alive[call.inputs[carrier]]):
                continue  # no constant channel: all that it would carry is zero
            own = tensors[call.weight].detach()
            _carry(layout, call, carrier, positions, multiple, edit(call.weight), own)
    _fold_gates(edits, model, layout, edit)
    return edits


def _fold_gates(edits: Edits, model: nn.Module, layout: Layout, edit: Editor) -> None:
    """Multiply every gate into its layer's weight and bias; the slim model has none."""
    for name, module in gated_modules(model):
        full = gate_name(name)
        gate = edits.tensors.pop(full, module.gate.detach().double())
        ids = layout.graph.axes.get((full, 0))
        if ids is not None:
            gate = gate[layout.alive[ids].to(gate.device)]
        for own in ("weight", "bias"):
            beside = full.removesuffix("gate") + own
            if getattr(module, own) is not None:
                multiply_outputs(module, edit(beside), gate)
            elif beside in edits.biases:
                multiply_outputs(module, edits.biases[beside], gate)


def _silence(edits: Edits, layout: Layout, wanted: Tensor, edit: Editor) -> None:
    """Make constant channels: nothing comes in, γ = 0, β = 1 at the first norm that writes them and
    0 at others; nobody reads them.

    The norm's output is then its β, and no gradient reaches γ or the producer's rows, so that they
    stay 0 in fine-tuning.

    Args:
        wanted: bool [graph.count], the ids of constant channels.
    """
    channels = layout.channels
    values: dict[str | None, float] = {}
    for call in channels.graph.projections:
        if not call.depthwise:  # one of these is part of what readers see of the channel
            values |= {call.weight: 0.0, call.bias: 0.0}
    written = torch.zeros_like(wanted)
    ones: dict[str, Tensor] = {}
    for name in channels.layers:
        norm = channels.calls[name]
        values |= {norm.weight: 0.0, norm.bias: 0.0, norm.mean: 0.0, norm.var: 1.0, norm.gate: 1.0}
        mine = channels.label[norm.inputs]
        ones[str(norm.bias)] = wanted[norm.inputs] & ~written[mine]
        written[mine] = True
    found = channels.axes.counts(wanted).tolist()
    for ((tensor, dim), axis), count in zip(channels.graph.axes.items(), found, strict=True):
        if count and tensor in values:
            places = layout.places(tensor, dim, wanted[axis])
            cut = edit(tensor)
            fill_(cut, dim, places, values[tensor])
            if tensor in ones:
                cut[layout.places(tensor, dim, ones[tensor]).to(cut.device)] = 1.0
            edits.blank.setdefault(tensor, []).append((dim, places))


def _carry(
    layout: Layout,
    call: ProjectionCall,
    carrier: int,
    positions: Tensor,
    multiple: Tensor,
    cut: Tensor,
    own: Tensor,
) -> None:
    """Outgoing weights of a constant channel: the sum of the removed channels' own, each times its
    multiple.

    Args:
        cut: the reader's weight in the slim model, changed in place.
        own: its full-size weight.
    """
    per_group = call.inputs.numel() // call.groups
    group, within = divmod(carrier, per_group)
    wanted = torch.zeros(call.inputs.numel(), dtype=torch.bool, device="cpu")
    wanted[carrier] = True
    weigh = multiple.to(own.device)
    if call.transposed:
        row = int(layout.places(call.weight, 0, wanted).nonzero())
        columns = layout.index(call.weight).get(1)
        if columns is not None and columns.dim() == 2:
            columns = columns[group]
        used = gather_channels(own, positions, columns).double()
        cut[row] = torch.tensordot(weigh, used, 1)
        return
    column = layout.places(
        call.weight, 1, wanted.view(call.groups, -1) if call.groups > 1 else wanted
    )
    rows = layout.alive[call.outputs].view(call.groups, -1)[group].nonzero().flatten()
    used = gather_channels(
        own, rows + group * (own.shape[0] // call.groups), positions % per_group
    ).double()
    block = cut.chunk(call.groups)[group]
    place = int((column[group] if call.groups > 1 else column).nonzero())
    block[:, place] = torch.einsum("c,oc...->o...", weigh, used).to(cut.dtype)
