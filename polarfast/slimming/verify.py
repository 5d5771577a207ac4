"""`verify`: does the slim model equal what it claims to equal?"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import double_copy, masked_copy
from ..errors import PlanError, VerificationError
from ..folding.replay import AsFolded, Fold, StaysDouble, run_double
from ..inputs import Inputs, convert, device_of, dtype_of, misplaced, unwrap
from ..planning.pruning_plan import PruningPlan
from ..running import seeded, tensors_of
from ..sharding import refuse_sharded
from ..tracing.classes import Channels

#: Values picked by their size; what is picked decides, not its value.
PICKS = frozenset("topk sort kthvalue median nanmedian mode".split())
#: Results with indices beside continuous values.
INDEXED = PICKS | frozenset("max min cummax cummin".split())
#: Operators that decide how many there are.
COUNTS = frozenset("nms nonzero unique_dim _unique2 unique_consecutive".split())
STEPS = frozenset("floor ceil round trunc sign".split())
#: What counts as rounding, by the dtype in which the slim model keeps its numbers: the largest
#: error as a share of the output's variation, and as a share of the output itself (a network whose
#: output hardly varies cannot be measured more finely).
ROUNDING = {
    torch.float64: (1e-9, 1e-13),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-1, 1e-2),
    torch.bfloat16: (3e-1, 3e-2),
}
#: Inputs that are compared on, beside further examples: random ones, and the first example.
RANDOM_INPUTS = 2


@dataclass
class Report:
    """How far a slim model is from the original with γ (and β, for fold="none") zero on the removed
    channels, in float64.

    Attributes:
        max_abs_diff: largest absolute difference of any output element.
        rel_error: the same as a share of `variation`.
        variation: how much the reference's output varies over the inputs: the largest range of any
            output element.
        exact: whether the difference is rounding only, of the dtype in which the slim model keeps
            its numbers.
        notes: reader's weight name -> why removed constants are not folded into it exactly.
        random: whether the original draws random numbers in eval mode.
        decided: whether the slim model was given the original's decisions (which boxes overlap,
            which scores are the highest), since they hang on rounding.
    """

    max_abs_diff: float
    rel_error: float
    variation: float
    exact: bool
    notes: dict[str, str] = field(default_factory=dict)
    decided: bool = False
    random: bool = False

    def __str__(self) -> str:
        verdict = "equal to rounding" if self.exact else "NOT equal"
        lines = [
            f"{verdict}: error {self.rel_error:.2e} of the output's variation "
            f"({self.max_abs_diff:.2e} absolute)"
            + (", given the original's choice among its scores" if self.decided else "")
        ]
        return "\n".join(lines + [f"  {name}: {note}" for name, note in self.notes.items()])


def verify(model: nn.Module, slim: nn.Module, plan: PruningPlan, example_inputs: Any) -> Report:
    """Compare a slim model with the original whose γ (and β for fold="none") are zero on the
    removed channels.

    Both run in float64 and eval mode on copies, on the given and on random inputs of the same
    shapes. The error is measured against how much the *output varies over inputs*: an untrained
    network's output hardly depends on its input, and would pass any other test.

    Args:
        model: the original.
        slim: the slim model; it must not have been trained since, or it rightly differs.
        plan: the plan it was made from.
        example_inputs: as for `plan`.

    Returns:
        The report; `exact` says whether they are equal.

    Raises:
        ArgumentError: either model is sharded.
        VerificationError: outputs differ in shape, or the original's are not finite.
        PlanError: the plan is not of this network, or it does not run in float64.
    """
    model, slim = unwrap(model), unwrap(slim)
    for either in (model, slim):
        refuse_sharded(either)
    _check_fits(model, plan)
    infos = [getattr(module, "polarfast_info", None) for module in slim.modules()]
    info = next((each for each in infos if each is not None), None)  # perhaps of what it wraps
    report = compare(
        model,
        slim,
        plan,
        info.fold if info else plan.fold,
        plan.inputs_like(example_inputs),
    )
    report.notes = dict(info.inexact if info else plan.inexact)
    return report


def _check_fits(model: nn.Module, plan: PruningPlan) -> None:
    params = dict(model.named_parameters())
    for name, layer in plan.layers.items():
        found = params[name].numel() if name in params else "no"
        if found != layer.channels:
            raise PlanError(
                f"the plan does not fit this model: {name} has {found} channels, the plan says "
                f"{layer.channels}: give the original first, then the slim model"
                f"{misplaced(plan.layers, model)}"
            )


class Decisions(StaysDouble):
    """Notes every decision of one run; a second run with the same object takes them over.

    A decision is a whole number or truth value that an operator finds from floating point numbers
    (comparisons, `argmax`, `nms`, a cast), an order (`sort`, `topk`), or a step (`floor`). Whoever
    replays has to look at `apart`: a decision may be taken over only where it hangs on rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, Tensor, list[Tensor]]] = []
        self.apart: list[tuple[Tensor, Tensor]] = []  # what they were taken from, in both runs
        self.place: int | None = None  # in `taken`, of the next decision to take over
        self.random = False  # whether random numbers were drawn

    def replay(self) -> "Decisions":
        """From here on, take the decisions over, from the first one on."""
        self.place = 0
        return self

    def named(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        plain = name.rstrip("_")
        if plain in STEPS and name.endswith("_"):  # the numbers are gone afterwards
            given = args[0].clone()
            return args[0].copy_(self._decide(name, func(*args, **kwargs), [given]))
        out = func(*args, **kwargs)
        if plain in INDEXED and isinstance(out, tuple):
            indices = self._decide(name, out[1], args)
            if plain not in PICKS:
                return out[0], indices
            return (out[0] if indices is out[1] else _picked(plain, args, kwargs, indices)), indices
        if not isinstance(out, Tensor) or not any(map(_continuous, args)):
            return out
        decides = not out.is_floating_point() and not out.is_complex()
        if not decides and plain not in STEPS:
            return out
        return self._decide(name, out, args)

    def _decide(self, name: str, own: Tensor, args: Any) -> Tensor:
        """The decision that counts: this one, or the one taken at this place before."""
        numbers = [arg for arg in args if _continuous(arg) and isinstance(arg, Tensor)]
        if self.place is None:
            self.taken.append((name, own.clone(), [number.clone() for number in numbers]))
            return own
        if self.place >= len(self.taken):
            return own
        known, taken, before = self.taken[self.place]
        self.place += 1
        # Over channels of which some are gone, each decides for itself.
        fits = taken.shape == own.shape or name in COUNTS
        fits &= [t.shape for t in before] == [t.shape for t in numbers]
        if known != name or not fits:
            return own
        self.apart += [(a, b.clone()) for a, b in zip(before, numbers, strict=True)]
        return taken.clone()


def _continuous(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(map(_continuous, arg))
    return isinstance(arg, Tensor) and arg.is_floating_point()


def _picked(name: str, args: Any, kwargs: dict[str, Any], indices: Tensor) -> Tensor:
    """The values at these places."""
    x = args[0]
    numbers = {"topk": (2, -1), "kthvalue": (2, -1)}
    place, dim = numbers.get(name, (1, -1))
    dim = kwargs.get("dim", args[place] if len(args) > place else dim)
    if indices.dim() == x.dim():
        return torch.gather(x, dim, indices)
    return torch.gather(x, dim, indices.unsqueeze(dim)).squeeze(dim)


def compare(
    model: nn.Module,
    slim: nn.Module,
    plan: PruningPlan,
    fold: str,
    examples: Inputs,
    claimed: tuple[Fold, Channels] | None = None,
) -> Report:
    """A slim model against the original without its removed channels."""
    reference = masked_copy(model, plan.kept, zero_beta=fold == "none")
    candidate = double_copy(slim).eval()
    return compare_networks(reference, candidate, examples, dtype_of(slim), claimed)


@torch.no_grad()
def compare_networks(
    reference: nn.Module,
    candidate: nn.Module,
    examples: Inputs,
    dtype: torch.dtype,
    claimed: tuple[Fold, Channels] | None = None,
) -> Report:
    """What two networks in float64 and eval mode compute, on the examples and random inputs.

    Args:
        dtype: in which the candidate keeps its numbers.
        claimed: constants that the reference is to replace removed channels by.
    """
    pairs = [
        _pair(reference, candidate, inputs, claimed)
        for inputs in inputs_to_compare(examples, device_of(reference))
    ]
    report = _measure([pair[:2] for pair in pairs], dtype)
    if not report.exact and any(decisions.taken for _, _, decisions in pairs):
        pairs = [
            _pair(reference, candidate, inputs, claimed, replay=True)
            for inputs in inputs_to_compare(examples, device_of(reference))
        ]
        helped = _measure([pair[:2] for pair in pairs], dtype)
        # What differs by more than rounding may be hidden behind a decision that was given.
        if not helped.exact or all(
            _is_rounding(a, b, dtype) for _, _, d in pairs for a, b in d.apart
        ):
            report = helped
            report.decided = True
    if report.max_abs_diff == float("inf"):
        _check_comparable(pairs)
    report.random = any(decisions.random for _, _, decisions in pairs)
    return report


def _pair(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Any,
    claimed: tuple[Fold, Channels] | None,
    replay: bool = False,
) -> tuple[list[Tensor], list[Tensor], Decisions]:
    """Outputs of both, and the decisions taken; the candidate's are the reference's if
    `replay`.
    """
    decisions = Decisions()
    with nullcontext() if claimed is None else _as_claimed(reference, *claimed), decisions:
        wanted, decisions.random = outputs_of(reference, inputs)
    with decisions.replay() if replay else nullcontext():
        got, _ = outputs_of(candidate, inputs)
    return wanted, got, decisions


def _measure(pairs: list[tuple[list[Tensor], list[Tensor]]], dtype: torch.dtype) -> Report:
    share, floor = ROUNDING[dtype]
    worst = max(_difference(wanted, got) for wanted, got in pairs)
    outputs = [wanted for wanted, _ in pairs]
    variation = max((_variation(same) for same in zip_longest(*outputs)), default=0.0)
    size = max((float(t.abs().max()) for wanted in outputs for t in wanted), default=0.0)
    exact = worst <= share * variation + floor * size
    relative = worst / variation if variation > 0 else 0.0 if exact else float("inf")
    return Report(worst, relative, variation, exact)


def _variation(outputs: tuple[Tensor | None, ...]) -> float:
    """How much one output varies over the inputs; over its own elements, where not even its shape
    is the same (as many boxes as there are).
    """
    found = [output for output in outputs if output is not None]
    if len({output.shape for output in found}) > 1:
        return max(float(output.max() - output.min()) for output in found)
    stacked = torch.stack(found)
    return float((stacked.amax(0) - stacked.amin(0)).max())


def _is_rounding(wanted: Tensor, got: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors of one shape, of which infinite elements may be part, hardly differ."""
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    if bool(same.all()):
        return True
    finite = wanted[wanted.isfinite()]
    if not finite.numel():
        return False
    share, floor = ROUNDING[dtype]
    limit = share * (finite.max() - finite.min()) + floor * finite.abs().max()
    return bool(((wanted - got).abs()[~same] <= limit).all())


def _check_comparable(pairs: list[tuple[list[Tensor], list[Tensor], Decisions]]) -> None:
    """Raise VerificationError where outputs cannot be compared at all."""
    for wanted, got, _ in pairs:
        shapes = [[tuple(t.shape) for t in outputs] for outputs in (got, wanted)]
        if shapes[0] != shapes[1]:
            raise VerificationError(
                f"the slim model's outputs have shapes {shapes[0]}, not {shapes[1]}"
            )
        if not all(bool(t.isfinite().all()) for t in wanted):
            raise VerificationError(
                "the original network's own output is not finite (NaN or inf), so nothing can be "
                "compared with it: has training diverged, or are the example inputs unlike real "
                "ones?"
            )


def _as_claimed(reference: nn.Module, folded: Fold, channels: Channels) -> AsFolded:
    return AsFolded(reference, folded, channels.graph.projections)


def _difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference; infinite where there is none to speak of."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return float("inf")
    largest = max((float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True)), default=0)
    return largest if largest == largest else float("inf")


def inputs_to_compare(examples: Inputs, device: torch.device) -> Iterator[Any]:
    for example in examples.examples:
        yield convert(example, device=device, dtype=torch.float64)
    for seed in range(RANDOM_INPUTS - bool(examples.examples)):
        yield from examples.each(device=device, dtype=torch.float64, seed=100 + seed)


def outputs_of(model: nn.Module, inputs: Any) -> tuple[list[Tensor], bool]:
    """All that a model returns, and whether it drew random numbers: the same ones each time."""
    device = device_of(model)
    with seeded(0, device):
        before = _random_state(device)
        found = tensors_of(run_double(model, inputs))
        drew = not torch.equal(before, _random_state(device))
    return [tensor.double() for tensor in found if tensor.numel()], drew


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
