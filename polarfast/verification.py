"""`verify`: does the slim model equal what it claims to equal?"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Channels
from .copies import double_copy, masked_copy
from .decisions import Decisions
from .errors import VerificationError
from .fields import Fold
from .inputs import convert, device_of, dtype_of, generate, unwrap
from .plans import PruningPlan
from .runs import AsFolded, run_double
from .sharded import refuse_sharded
from .tracing import tensors_of

#: What counts as rounding, by the dtype in which the slim model keeps its numbers: the largest
#: error as a share of the output's variation, and as a share of the output itself (a network whose
#: output hardly varies cannot be measured more finely).
ROUNDING = {
    torch.float64: (1e-9, 1e-13),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-1, 1e-2),
    torch.bfloat16: (3e-1, 3e-2),
}
#: Random inputs beside the given ones.
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
        decided: whether the slim model was given the original's decisions (which boxes overlap,
            which scores are the highest), since they hang on rounding.
    """

    max_abs_diff: float
    rel_error: float
    variation: float
    exact: bool
    notes: dict[str, str] = field(default_factory=dict)
    decided: bool = False

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
    """
    for either in (model, slim):
        refuse_sharded(unwrap(either))
    info = getattr(unwrap(slim), "polarfast_info", None)
    report = _compare(
        unwrap(model), unwrap(slim), plan, info.fold if info else plan.fold, example_inputs
    )
    report.notes = dict(info.inexact if info else plan.inexact)
    return report


def check_slim(
    model: nn.Module,
    slim: nn.Module,
    plan: PruningPlan,
    fold: str,
    folded: Fold,
    channels: Channels,
) -> None:
    """`slim`'s own check, on random inputs: the slim model must be what the plan says, exactly.

    Where a fold is not exact, the reference sees what was folded instead of what is there, so that
    one such reader hides nothing else.

    Raises:
        VerificationError: the slim model does not run, or differs.
    """
    try:
        report = _compare(model, slim, plan, fold, None, (folded, channels))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise VerificationError(
            f"the slim model does not run: {type(error).__name__}: {error}. The network's code "
            "fixes a size that pruning changes (an assertion, a hard-coded size): leave the layers "
            "before it out with scales.select(…)"
        ) from error
    if not report.exact:
        raise VerificationError(
            f"the slim model is not what the plan says (fold={fold!r}): error "
            f"{report.rel_error:.2e} of the output's variation, {report.max_abs_diff:.2e} absolute."
            " Either the network's code computes with the number of channels (x / x.shape[1]), or "
            "this is a bug in polarfast: please report the model. verify=False returns the slim "
            "model all the same"
        )


@torch.no_grad()
def _compare(
    model: nn.Module,
    slim: nn.Module,
    plan: PruningPlan,
    fold: str,
    given: Any,
    claimed: tuple[Fold, Channels] | None = None,
) -> Report:
    reference = masked_copy(model, plan.kept, zero_beta=fold == "none")
    candidate = double_copy(slim).eval()
    dtype = dtype_of(slim)
    pairs = [
        _pair(reference, candidate, inputs, claimed)
        for inputs in _inputs(plan, given, device_of(reference))
    ]
    report = _measure([pair[:2] for pair in pairs], dtype)
    if not report.exact and any(decisions.taken for _, _, decisions in pairs):
        pairs = [
            _pair(reference, candidate, inputs, claimed, replay=True)
            for inputs in _inputs(plan, given, device_of(reference))
        ]
        given = _measure([pair[:2] for pair in pairs], dtype)
        # What differs by more than rounding may be hidden behind a decision that was given.
        if not given.exact or all(
            _is_rounding(a, b, dtype) for _, _, d in pairs for a, b in d.apart
        ):
            report = given
            report.decided = True
    if report.max_abs_diff == float("inf"):
        _check_comparable(pairs)
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
        wanted = _outputs(reference, inputs)
    with decisions.replay() if replay else nullcontext():
        got = _outputs(candidate, inputs)
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


def _inputs(plan: PruningPlan, given: Any, device: torch.device) -> Iterator[Any]:
    if given is not None:
        yield convert(given, device=device, dtype=torch.float64)
    for seed in range(RANDOM_INPUTS):
        yield generate(plan.inputs, device=device, dtype=torch.float64, seed=100 + seed)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    found = tensors_of(run_double(model, inputs))
    return [tensor.double() for tensor in found if tensor.numel()]
