"""Decisions that a network takes from numbers: which boxes overlap, which scores are the highest.

Rounding alone may change them, and all that follows. So a slim model is compared with the original
on the original's decisions.
"""

from typing import Any

import torch
from torch import Tensor

from .runs import StaysDouble

#: Values picked by their size; what is picked decides, not its value.
PICKS = frozenset("topk sort kthvalue median nanmedian mode".split())
#: Results with indices beside continuous values.
INDEXED = PICKS | frozenset("max min cummax cummin".split())
#: Operators that decide how many there are.
COUNTS = frozenset("nms nonzero unique_dim _unique2 unique_consecutive".split())
STEPS = frozenset("floor ceil round trunc sign".split())


class Selections(StaysDouble):
    """Notes every decision of one run; a second run with the same object takes them over.

    A decision is a whole number or truth value that an operator finds from floating point numbers
    (comparisons, `argmax`, `nms`, a cast), an order (`sort`, `topk`), or a step (`floor`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, Tensor]] = []
        self.place: int | None = None  # in `taken`, of the next decision to take over

    def replay(self) -> "Selections":
        """From here on, take the decisions over, from the first one on."""
        self.place = 0
        return self

    def operator(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        plain = name.rstrip("_")
        if plain in INDEXED and isinstance(out, tuple):
            indices = self._decide(name, out[1])
            if plain not in PICKS:
                return out[0], indices
            return (out[0] if indices is out[1] else _picked(plain, args, kwargs, indices)), indices
        if not isinstance(out, Tensor) or not any(map(_continuous, args)):
            return out
        decides = not out.is_floating_point() and not out.is_complex()
        if not decides and plain not in STEPS:
            return out
        taken = self._decide(name, out)
        return out if taken is out else out.copy_(taken) if name.endswith("_") else taken

    def _decide(self, name: str, own: Tensor) -> Tensor:
        """The decision that counts: this one, or the one taken at this place before."""
        if self.place is None:
            self.taken.append((name, own.clone()))
            return own
        known, taken = self.taken[self.place] if self.place < len(self.taken) else ("", own)
        self.place += 1
        # Over channels of which some are gone, each decides for itself.
        fits = taken.shape == own.shape or name in COUNTS
        return taken.clone() if known == name and fits else own


def _continuous(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(map(_continuous, arg))
    return isinstance(arg, Tensor) and arg.is_floating_point()


def _picked(name: str, args: Any, kwargs: dict[str, Any], indices: Tensor) -> Tensor:
    """The values at these places."""
    x = args[0]
    numbers = {"topk": (2, -1), "kthvalue": (2, -1)}
    place, dim = numbers.get(name, (1, -1))
    dim = kwargs.get("dim", args[place] if len(args) > place else dim)
    if indices.dim() == x.dim():
        return torch.gather(x, dim, indices)
    return torch.gather(x, dim, indices.unsqueeze(dim)).squeeze(dim)
