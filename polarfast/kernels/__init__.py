"""The ops.

Each has one schema (csrc/schemas.cpp), one eager reference (*_ref.py), one CPU kernel (csrc) and,
but for the gather and the put-back, one Triton kernel (*_triton.py).
"""

import torch  # noqa: F401  the extension's symbols are torch's: torch comes first

from ..errors import BuildError

try:
    from .. import _C  # noqa: F401
except ImportError as error:
    raise BuildError(
        f"polarfast's compiled extension does not load ({error}); build it again with "
        "`pip install --no-build-isolation .`, which needs a C++ compiler and torch >= 2.10"
    ) from error

from . import gather, polarize, put_back, valley  # noqa: E402, F401  they register the ops
