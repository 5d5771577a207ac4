"""`slim`'s own check: the slim model is what the plan says, or an error says why not."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import copy_of
from ..errors import PlanError, PolarfastError, VerificationError
from ..folding.replay import Fold
from ..inputs import Inputs, convert, device_of
from ..planning.pruning_plan import PruningPlan
from ..reproduction import request
from ..tracing.classes import Channels
from ..tracing.graph import PIN, compact
from .verify import compare, outputs_of

Claimed = tuple[Fold, Channels]
#: What a network may raise that is given other channels than its code expects.
_ANY = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)


def check_slim(
    model: nn.Module,
    slim: nn.Module,
    plan: PruningPlan,
    fold: str,
    inputs: Inputs,
    claimed: Claimed,
    anew: Callable[[], tuple[nn.Module, Claimed]] | None = None,
) -> None:
    """Compare a slim model with the original on random inputs: it must be what the plan says,
    exactly.

    Where a fold is not exact, the reference sees what was folded instead of what is there, so that
    one such reader hides nothing else.

    Args:
        model, slim: both in float64.
        claimed: the constants that were folded, and the channels that they are of.
        anew: makes both from the network as it is, where those at hand are from an earlier look.

    Raises:
        VerificationError: the slim model does not run, or differs.
    """
    inputs = inputs.few()
    try:
        report = compare(model, slim, plan, fold, inputs, claimed)
    except _ANY as error:
        raise VerificationError(
            f"the slim model does not run: {type(error).__name__}: {error}. The network's code "
            "fixes a size that pruning changes (an assertion, a hard-coded size): leave the layers "
            "before it out with scales.select(…); or has changed since the plan was made: make the "
            "plan anew"
        ) from error
    if report.exact:
        return
    if report.random:
        raise VerificationError(
            "the network draws random numbers in eval mode, others in the slim model than in the "
            "original, so that these cannot be compared: make it draw none while pf.slim runs, or "
            "as many whatever the number of channels; verify=False returns the slim model unchecked"
        )
    failed = _Failed(model, slim, plan, fold, inputs, claimed, anew)
    raise VerificationError(
        f"the slim model is not what the plan says (fold={fold!r}): error "
        f"{report.rel_error:.2e} of the output's variation, {report.max_abs_diff:.2e} absolute; "
        f"verify=False returns it all the same. {failed.why()}"
    )


@dataclass
class _Failed:
    """A check that failed: what `check_slim` was given. What the network itself does is looked for
    before it counts as a fault of polarfast.
    """

    model: nn.Module
    slim: nn.Module
    plan: PruningPlan
    fold: str
    inputs: Inputs
    claimed: Claimed
    anew: Callable[[], tuple[nn.Module, Claimed]] | None

    def why(self) -> str:
        """The cause, and what to do."""
        for found in (self._unrepeatable, self._changed, self._hooked, self._counting):
            reason = found()
            if reason is not None:
                return reason
        unless = (
            "Unless the network's code goes by a number of channels in a way that does not show, "
            if self._right_at_full_width() is None
            else "Nothing that the network does explains it: "
        )
        call = f"pf.slim(model, plan, fold={self.fold!r}, inputs=x)"
        return unless + request(self.model, self._examples(), call, _short(self.plan))

    def _examples(self) -> list[object]:
        """Those that were given, else others like them; in float64."""
        device, dtype, given = device_of(self.model), torch.float64, self.inputs.examples
        if given:
            return [convert(example, device=device, dtype=dtype) for example in given]
        return list(self.inputs.each(device=device, dtype=dtype, seed=0))

    def _unrepeatable(self) -> str | None:
        """Whether the network goes by more than its input."""
        model, x = copy_of(self.model).eval(), self._examples()[0]
        first, second = (outputs_of(model, x)[0] for _ in range(2))
        same = [t.shape for t in first] == [t.shape for t in second]
        if same and all(map(torch.allclose, first, second)):
            return None
        return (
            "The network itself gives another output when it runs a second time on the same input: "
            "its forward changes something that it goes by (a buffer, a counter), or draws random "
            "numbers that are not torch's. Switch that off while pf.slim runs"
        )

    def _changed(self) -> str | None:
        """Whether what is built from the network as it is now is right."""
        if self.anew is None:
            return None
        try:
            slim, claimed = self.anew()
            now = compare(self.model, slim, self.plan, self.fold, self.inputs, claimed).exact
        except (PolarfastError, *_ANY):  # the plan does not fit any more
            now = True
        if not now:
            return None
        return (
            "An attribute, a hook or the code of the network has changed since the plan was made: "
            "make the plan anew"
        )

    def _hooked(self) -> str | None:
        """Whether it is what the plan says without its hooks."""
        hooked = [
            name or "the model"
            for name, module in self.model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]
        model, slim = copy_of(self.model), copy_of(self.slim)
        for module in (*model.modules(), *slim.modules()):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        try:
            bare = compare(model, slim, self.plan, self.fold, self.inputs, self.claimed)
        except (PolarfastError, *_ANY):  # it needs its hooks
            return None
        if not hooked or not bare.exact:
            return None
        return (
            f"Without the forward hooks on {', '.join(hooked[:4])} it is: one of them computes "
            "something else in the slim model, by a number of channels or by layers that are not "
            "the slim model's. Register them after pf.slim, on the slim model"
        )

    def _counting(self) -> str | None:
        """Whether the network's code computes with a number of channels that pruning changes."""
        layers = self._with_lost_channels(self.claimed[1].graph.numbers)
        right = self._right_at_full_width()
        if right is False or (right is None and not layers):
            return None
        return (
            f"The network's code computes with a number of channels{layers and f' of {layers}'} (as"
            " x / x.shape[1] and x / self.conv.out_channels do), which pruning changes: let it take"
            " a number that stays, or leave the layers before that out with scales.select(…)"
        )

    def _right_at_full_width(self) -> bool | None:
        """Whether the slim model's numbers are right where the original has them, so that only the
        narrower network's own code can be wrong; None where they cannot be put back.
        """
        if hasattr(self.model, "polarfast_info"):  # the way back leads to the first original
            return None
        info: Any = self.slim.polarfast_info
        full = copy_of(self.model)
        try:
            info.origin.write_back(self.slim, full)
        except (PlanError, KeyError):  # it has biases that the original lacks, or no gates
            return None
        args = (self.plan, self.fold, self.inputs, self.claimed)
        return compare(self.model, full, *args).exact

    def _with_lost_channels(self, rows: list[Tensor]) -> str:
        """The layers whose channels are among these ids, of rows that lose some."""
        channels = self.claimed[1]
        gone, found = channels.graph.mask(), channels.graph.mask()
        for name, kept in self.plan.kept.items():
            goes = torch.ones(channels.layers[name].numel(), dtype=torch.bool, device="cpu")
            goes[kept] = False
            gone[channels.layers[name][goes]] = True
        for row in (channels.label[compact(ids)] for ids in rows):
            found[row] |= gone[row].any()
        found[PIN] = False
        names = [name for name in self.plan.kept if bool(found[channels.layers[name]].any())]
        return ", ".join(names[:4])


def _short(plan: PruningPlan) -> str:
    """The text of a plan without what is only for people."""
    data = json.loads(plan.to_json())
    for key in ("pinned_macs", "remarks", "asked"):
        del data[key]
    data |= {"pinned": {}, "inexact": {}}
    for layer in data["layers"].values():
        layer["note"] = ""
    return json.dumps(data, separators=(",", ":"))
