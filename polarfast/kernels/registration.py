"""What the dispatcher needs beside the C++ kernels, the same for every op."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("polarfast", "IMPL")  # registrations last as long as it does


def register(name: str, *, fake: Callable[..., Any], elsewhere: Callable[..., Any]) -> None:
    """Registers an op's shapes for tracing, and what runs where there is no C++ kernel."""
    torch.library.register_fake(f"polarfast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
