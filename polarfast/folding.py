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
from .fields import Fold, ReaderFold, level_of, masked_copy, read_fields, shift
from .inputs import Spec, device_of, generate


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
    device = device_of(model)
    first, second = (
        read_fields(
            masked,
            generate(spec, device=device, dtype=torch.float64, seed=seed),
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
        reader = result.readers[i] = ReaderFold(call.weight)
        level, problem = level_of(seen, second[i])
        edge = call.padded or call.transposed
        if problem is None and not edge or mode == "bias":
            reader.note = problem or ("zero padding: not exact at the border" if edge else None)
            reader.shift = shift(masked, call, wanted[i], level)
        else:
            pending[i] = problem or "zero padding"
    if pending:
        carry = Carriers(masked, channels, alive, wanted, spec).carry
        for i, problem in pending.items():
            carry(result, i, first[i], second[i], problem)
    return result
