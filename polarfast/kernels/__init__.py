"""What is fast: the tables of scaling factors, the ops, and the choice of a backend.

A table (table.py) holds all γ of a network and works on all at once: in C++ on the CPU
(scale_table.py), with Triton on GPUs (triton_table.py), and in plain torch for the rest, which is
also the readable statement of the formulas (eager_table.py). The ops (gather.py, put_back.py) have
one schema (csrc/schemas.cpp), one eager reference and one CPU kernel (csrc) each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BuildError
from ..sharding import is_sharded

try:
    from .._C import Roster as Roster
    from .._C import ScaleRows as ScaleRows
    from .._C import build_info as build_info
except ImportError as error:
    raise BuildError(
        f"polarfast's compiled extension does not load ({error}); build it again with "
        "`pip install --no-build-isolation .`, which needs a C++ compiler and torch >= 2.10"
    ) from error

from . import gather, put_back  # noqa: E402, F401  they register the ops
from .eager_table import EagerTable  # noqa: E402
from .scale_table import ScaleTable  # noqa: E402
from .table import Table  # noqa: E402


def table_of(
    names: Sequence[str],
    params: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    tilts: Sequence[float] | None = None,
) -> Table:
    """The table for these γ, wherever they are; as for `Table`.

    Raises:
        ArgumentError, ScalingFactorError: a γ cannot be used; the message names it.
        BuildError: Triton is needed and cannot be imported.
    """
    if any(map(is_sharded, params)):
        return EagerTable(names, params, weights, tilts)
    device = params[0].device if params else torch.device("cpu")
    return table_type(device.type)(names, params, weights, tilts)


def table_type(device: str) -> type[Table]:
    """The kind of table for plain tensors on a type of device, such as "cuda".

    Raises:
        BuildError: it is "cuda", and Triton cannot be imported.
    """
    if device == "cpu":
        return ScaleTable
    if device not in ("cuda", "xpu"):
        return EagerTable
    try:
        from .triton_table import TritonTable  # only now: Triton is optional
    except ImportError as error:
        if device == "xpu":
            return EagerTable
        raise BuildError(
            "Scaling factors on a GPU need Triton, which cannot be imported "
            f"({error}); install it with `pip install triton`"
        ) from error
    return TritonTable
