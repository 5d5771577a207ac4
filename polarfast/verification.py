"""`verify`: does the slim model equal what it claims to equal?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import VerificationError
from .fields import double_copy, masked_copy
from .inputs import convert, device_of, dtype_of, generate, unwrap
from .plans import PruningPlan
from .tracing import call_model

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
    """

    max_abs_diff: float
    rel_error: float
    variation: float
    exact: bool
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = "equal to rounding" if self.exact else "NOT equal"
        lines = [
            f"{verdict}: error {self.rel_error:.2e} of the output's variation "
            f"({self.max_abs_diff:.2e} absolute)"
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
    info = getattr(unwrap(slim), "polarfast_info", None)
    report = _compare(
        unwrap(model), unwrap(slim), plan, info.fold if info else plan.fold, example_inputs
    )
    report.notes = dict(info.inexact if info else plan.inexact)
    return report


def check_slim(
    model: nn.Module, slim: nn.Module, plan: PruningPlan, fold: str, *, exact: bool
) -> None:
    """`slim`'s own check, on random inputs.

    Raises:
        VerificationError: the slim model does not run, or is meant to be exact and is not.
    """
    try:
        report = _compare(model, slim, plan, fold, None)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise VerificationError(
            f"the slim model does not run: {error}. The network's code fixes a size that pruning "
            "changes (a hard-coded view, "
            "reshape or split): leave the layers before it out with scales.select(…)"
        ) from error
    if exact and not report.exact:
        raise VerificationError(
            "the slim model is not equal to the original with γ = 0 on the removed channels "
            f"(fold={fold!r}): error "
            f"{report.rel_error:.2e} of the output's variation, {report.max_abs_diff:.2e} "
            "absolute. This is a bug in polarfast: "
            "please report the model; verify=False returns the slim model all the same"
        )


@torch.no_grad()
def _compare(model: nn.Module, slim: nn.Module, plan: PruningPlan, fold: str, given: Any) -> Report:
    share, floor = ROUNDING[dtype_of(slim)]
    reference = masked_copy(model, plan.kept, zero_beta=fold == "none")
    candidate = double_copy(slim).eval()
    device = device_of(reference)
    worst = 0.0
    low: list[Tensor] = []
    high: list[Tensor] = []
    for inputs in _inputs(plan, given, device):
        wanted, got = _outputs(reference, inputs), _outputs(candidate, inputs)
        if [tuple(t.shape) for t in wanted] != [tuple(t.shape) for t in got]:
            raise VerificationError(
                f"the slim model's outputs have shapes {[tuple(t.shape) for t in got]}, not "
                f"{[tuple(t.shape) for t in wanted]}"
            )
        if not all(bool(t.isfinite().all()) for t in wanted):
            raise VerificationError(
                "the original network's own output is not finite (NaN or inf), so nothing can be "
                "compared with it: has its training diverged?"
            )
        for a, b in zip(wanted, got, strict=True):
            difference = float((a - b).abs().max()) if a.numel() else 0.0
            worst = max(worst, difference if difference == difference else float("inf"))
        low = [torch.minimum(a, b) for a, b in zip(low, wanted, strict=True)] if low else wanted
        high = [torch.maximum(a, b) for a, b in zip(high, wanted, strict=True)] if high else wanted
    variation = max(
        (float((b - a).max()) for a, b in zip(low, high, strict=True) if a.numel()), default=0.0
    )
    size = max((float(t.abs().max()) for t in (*low, *high) if t.numel()), default=0.0)
    exact = worst <= share * variation + floor * size
    relative = worst / variation if variation > 0 else 0.0 if exact else float("inf")
    return Report(worst, relative, variation, exact)


def _inputs(plan: PruningPlan, given: Any, device: torch.device) -> Iterator[Any]:
    if given is not None:
        yield convert(given, device=device, dtype=torch.float64)
    for seed in range(RANDOM_INPUTS):
        yield generate(plan.inputs, device=device, dtype=torch.float64, seed=100 + seed)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(call_model(model, inputs))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]
