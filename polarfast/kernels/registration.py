"""What the dispatcher needs beside the C++ kernels, and what it does not check: the same for every
op.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("polarfast", "IMPL")  # registrations last as long as it does


def register(name: str, *, fake: Callable[..., Any], elsewhere: Callable[..., Any]) -> None:
    """Registers an op's shapes for tracing, and what runs where there is no C++ kernel."""
    torch.library.register_fake(f"polarfast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")


def refuse_backward(name: str) -> None:
    """Registers that an op has no gradient: torch would warn, and go on without one."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"polarfast: {name} is not differentiable: call it under torch.no_grad()"
        )

    torch.library.register_autograd(f"polarfast::{name}", backward, lib=_LIBRARY)


def check_tensors(optional: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """Raise RuntimeError unless all of an op's tensors are there, dense and on one device.

    The dispatcher looks at the tensors together: with one of them on the meta device, it is the
    shape function that runs, and what that returns is uninitialized memory.
    """
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            if name in optional:
                continue
            raise RuntimeError(f"polarfast: {name} must be a tensor, not None")
        first = tensor if first is None else first
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise RuntimeError(f"polarfast: {name} must be a dense tensor, not {_kind(tensor)}")
        if tensor.device != first.device:
            raise RuntimeError(
                f"polarfast: all tensors must be on one device, and {name} is on {tensor.device}, "
                f"{next(iter(tensors))} on {first.device}"
            )


def check_index(name: str, index: Tensor) -> None:
    """Raise RuntimeError for an index of another form than the ops take."""
    if index.dim() != 1 or index.dtype != torch.int64:
        raise RuntimeError(
            f"polarfast: {name} must be a 1-D int64 tensor, not {index.dim()}-D {index.dtype}"
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested one"
    return f"a quantized one ({tensor.dtype})" if tensor.is_quantized else str(tensor.layout)
