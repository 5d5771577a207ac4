"""What removed channels leave behind: constants, handed on to whatever reads them.

A channel with γ = 0 is not nothing. It is the constant act(β), whatever the input, and its readers
see it. The constants are read off the real network: a float64 copy with γ = 0 on the removed
channels runs in eval mode, and what a reader sees in a removed channel *is* the constant. Where it
is the same everywhere, it becomes a bias; where zero padding (or another linear map that all
removed channels share) shapes it, one constant channel with γ = 0, β = 1 carries that shape for
all of them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .carriers import Carriers
from .channels import Channels
from .fields import Fold, ReaderFold, level_of, masked_copy, put_interior, read_fields
from .gates import plain_type
from .inputs import Spec, device_of, generate
from .tracing import ProjectionCall


def fold_constants(
    model: nn.Module,
    channels: Channels,
    kept: dict[str, Tensor],
    alive: Tensor,
    spec: Spec,
    mode: str,
    forced: Iterable[int] = (),
) -> Fold:
    """Work out what the readers of removed channels must take over.

    Args:
        model: the original network.
        channels: its channel classes.
        kept: γ name -> kept channels.
        alive: bool [graph.count], without constant channels.
        spec: description of the inputs.
        mode: "none" (β is dropped first), "bias" or "exact".
        forced: classes that stay as constant channels whether or not they are needed, as a plan
            says.
    """
    graph = channels.graph
    gone = {
        i: (~alive[call.inputs]).nonzero().flatten() for i, call in enumerate(graph.projections)
    }
    wanted = {
        i: idx
        for i, idx in gone.items()
        if idx.numel()
        and not graph.projections[i].depthwise
        and bool(alive[graph.projections[i].outputs].any())
    }
    result = Fold(constant=set(forced))
    if not wanted:
        return result
    masked = masked_copy(model, kept, mode == "none")
    sinks = Sinks(model, channels)
    first, second = (
        read_fields(
            masked,
            generate(spec, device=device_of(model), dtype=torch.float64, seed=seed),
            wanted,
            graph.projections,
        )
        for seed in (1, 2)
    )
    pending: dict[int, str] = {}
    for i, seen in first.items():
        call = graph.projections[i]
        if not bool(seen.any()) and not bool(second[i].any()):
            continue
        reader = result.readers[i] = ReaderFold(call.weight, sinks.name(i))
        level, problem = level_of(seen, second[i])
        if problem is None and (call.padded or call.transposed):
            problem = "zero padding: not exact at the border"
        if problem is None and sinks.lost(i):
            problem = "its layer has no bias that could take up a constant"
        if problem is None or mode == "bias":
            put_interior(masked, call, reader, wanted[i], level, problem)
        else:
            pending[i] = problem
    if pending:
        carriers = Carriers(masked, channels, alive, wanted, spec)
        for i, problem in pending.items():
            shared = len(sinks.calls_of_weight(i)) > 1  # one weight, several readings
            carriers.carry(result, i, first[i], second[i], problem, refuse=shared)
    sinks.settle(result)
    return result


class Sinks:
    """Where the constants added to each call's output go.

    A norm that alone reads the output, untouched, takes them into its running mean: a bias there
    would be cancelled in training. Else the bias takes them, created if torch's layer has none.
    """

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self._model, self._channels = model, channels
        self._calls = channels.graph.projections
        self._names = [self._find(i, call) for i, call in enumerate(self._calls)]

    def _find(self, index: int, call: ProjectionCall) -> tuple[str | None, bool]:
        """The tensor's name (None: the norm behind cancels it), and whether it is lost."""
        norm = self._channels.sole_norm(index)
        if norm is not None:
            return norm.mean, False
        if call.bias is not None:
            return call.bias, False
        owner, _, attribute = call.weight.rpartition(".")
        if plain_type(self._model.get_submodule(owner)) in WITH_BIAS and attribute == "weight":
            return f"{owner}.bias".lstrip("."), False
        return None, True

    def name(self, index: int) -> str | None:
        """The tensor that takes up what is added to this call's output."""
        return self._names[index][0]

    def lost(self, index: int) -> bool:
        """Whether nothing can take it up."""
        return self._names[index][1]

    def calls_of_weight(self, index: int) -> list[int]:
        """The eval-mode calls of the same weight."""
        weight = self._calls[index].weight
        return [i for i, c in enumerate(self._calls) if c.weight == weight and c.counted]

    def settle(self, result: Fold) -> None:
        """Where calls that share a sink would add different constants, fold their mean."""
        users: dict[str, list[int]] = {}
        for i, call in enumerate(self._calls):
            name = self.name(i)
            if name is not None and call.counted:
                users.setdefault(name, []).append(i)
        for name in {r.sink for r in result.readers.values() if r.shift is not None and r.sink}:
            width = self._calls[users[name][0]].outputs.numel()
            zero = torch.zeros(width, dtype=torch.float64, device="cpu")
            shifts = []
            for i in users[name]:
                shift = result.readers[i].shift if i in result.readers else None
                shifts.append(zero if shift is None else shift)
            mean = torch.stack(shifts).mean(0)
            if all(torch.allclose(shift, mean, rtol=1e-12, atol=0) for shift in shifts):
                continue
            for i in users[name]:
                reader = result.readers.setdefault(i, ReaderFold(self._calls[i].weight, name))
                reader.shift = mean
                reader.note = f"shares {name} with a call that reads other constants: their mean"


#: Torch's layers whose forward adds `self.bias` unless it is None.
WITH_BIAS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
