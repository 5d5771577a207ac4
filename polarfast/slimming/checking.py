"""`slim`'s own check: the slim model is what the plan says, or an error says why not."""

import copy
import json

import torch
from torch import Tensor, nn

from ..errors import PolarfastError, VerificationError
from ..folding.replay import Fold
from ..inputs import Inputs, convert, device_of
from ..planning.pruning_plan import PruningPlan
from ..reproduction import request
from ..tracing.classes import Channels, trace_channels
from ..tracing.graph import PIN, compact
from .verify import compare, outputs_of


def check_slim(
    model: nn.Module,
    slim: nn.Module,
    plan: PruningPlan,
    fold: str,
    inputs: Inputs,
    claimed: tuple[Fold, Channels],
) -> None:
    """Compare a slim model with the original on random inputs: it must be what the plan says,
    exactly.

    Where a fold is not exact, the reference sees what was folded instead of what is there, so that
    one such reader hides nothing else.

    Args:
        model, slim: both in float64.

    Raises:
        VerificationError: the slim model does not run, or differs.
    """
    try:
        report = compare(model, slim, plan, fold, inputs, claimed)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
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
    failed = _Failed(model, slim, plan, fold, inputs, claimed)
    raise VerificationError(
        f"the slim model is not what the plan says (fold={fold!r}): error "
        f"{report.rel_error:.2e} of the output's variation, {report.max_abs_diff:.2e} absolute; "
        f"verify=False returns it all the same. {failed.why()}"
    )


class _Failed:
    """A check that failed. What the network itself does is looked for before it counts as a fault
    of polarfast.
    """

    def __init__(
        self,
        model: nn.Module,
        slim: nn.Module,
        plan: PruningPlan,
        fold: str,
        inputs: Inputs,
        claimed: tuple[Fold, Channels],
    ) -> None:
        self.model, self.slim, self.plan, self.fold = model, slim, plan, fold
        self.inputs, self.claimed, self.channels = inputs, claimed, claimed[1]

    def why(self) -> str:
        """The cause, and what to do."""
        for found in (self._unrepeatable, self._changed, self._hooked, self._counting):
            reason = found()
            if reason is not None:
                return reason
        seen = self._with_lost_channels(self.channels.graph.sizes)
        unless = (
            f"Unless the network's code computes with the number of channels of {seen} in a way "
            "that does not show (1.0 / x.shape[1]), "
            if seen
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
        model, x = copy.deepcopy(self.model).eval(), self._examples()[0]
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
        """Whether the network is still the one that was traced."""
        try:
            now = trace_channels(self.model, self._examples(), self.channels.residual)
        except PolarfastError:
            now = None
        if now is not None and _calls(now) == _calls(self.channels):
            return None
        return (
            "An attribute, a hook or the code of the network has changed since the plan was made, "
            "and with it what its layers read: make the plan anew"
        )

    def _hooked(self) -> str | None:
        """Whether it is what the plan says without its hooks."""
        hooked = [
            name or "the model"
            for name, module in self.model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]
        model, slim = copy.deepcopy(self.model), copy.deepcopy(self.slim)
        for module in (*model.modules(), *slim.modules()):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        args = (self.plan, self.fold, self.inputs, self.claimed)
        if not hooked or not compare(model, slim, *args).exact:
            return None
        return (
            f"Without the forward hooks on {', '.join(hooked[:4])} it is: one that goes by a layer "
            "or a size of the original does so in the slim model too. Let it go by the module that "
            "it is given, or register it after pf.slim"
        )

    def _counting(self) -> str | None:
        """Whether the network's code computes with a number of channels that pruning changes."""
        layers = self._with_lost_channels(self.channels.graph.numbers)
        if not layers:
            return None
        return (
            f"The network's code computes with the number of channels of {layers} (as x / "
            "x.shape[1] does), which pruning changes: let it take a number that stays, or leave "
            "these layers out with scales.select(…)"
        )

    def _with_lost_channels(self, rows: list[Tensor]) -> str:
        """The layers whose channels are among these ids, of rows that lose some."""
        channels = self.channels
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


def _calls(channels: Channels) -> list[tuple[object, ...]]:
    """What each layer reads and writes, by class."""
    graph, label = channels.graph, channels.label
    rows: list[tuple[str | None, Tensor, Tensor]] = [
        *((call.weight, call.inputs, call.outputs) for call in graph.projections),
        *((call.scale, call.inputs, call.outputs) for call in graph.norms),
    ]
    return [(name, label[a].tolist(), label[b].tolist()) for name, a, b in rows]


def _short(plan: PruningPlan) -> str:
    """The text of a plan without what is only for people."""
    data = json.loads(plan.to_json())
    for key in ("pinned_macs", "remarks", "asked"):
        del data[key]
    data |= {"pinned": {}, "inexact": {}}
    for layer in data["layers"].values():
        layer["note"] = ""
    return json.dumps(data, separators=(",", ":"))
