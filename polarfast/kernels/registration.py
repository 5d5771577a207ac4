"""What the dispatcher needs beside the C++ kernels, the same for every op."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

_LIBRARY = torch.library.Library("polarfast", "IMPL")  # registrations last as long as it does


def register(name: str, *, fake: Callable[..., Any], elsewhere: Callable[..., Any]) -> None:
    """Registers an op's shapes for tracing, and what runs where there is no C++ kernel.

    Ops that write to their arguments (``(a!)`` in the schema) also get their version counters
    bumped: a C++ kernel cannot do that through the stable ABI.
    """
    torch.library.register_fake(f"polarfast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    op = getattr(torch.ops.polarfast, name).default
    written = [
        i
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        _LIBRARY.impl(name, _bumping(op, written), "ADInplaceOrView", with_keyset=True)


def _bumping(op: torch._ops.OpOverload, written: Sequence[int]) -> Callable[..., Any]:
    """The op's kernel for the dispatch key at which in-place ops bump version counters."""

    def kernel(keyset: Any, *args: Any) -> Any:
        for i in written:
            increment_version(args[i])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel
