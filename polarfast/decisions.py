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


class Decisions(StaysDouble):
    """Notes every decision of one run; a second run with the same object takes them over.

    A decision is a whole number or truth value that an operator finds from floating point numbers
    (comparisons, `argmax`, `nms`, a cast), an order (`sort`, `topk`), or a step (`floor`). Whoever
    replays has to look at `apart`: a decision may be taken over only where it hangs on rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, Tensor, list[Tensor]]] = []
        self.apart: list[tuple[Tensor, Tensor]] = []  # what they were taken from, in both runs
        self.place: int | None = None  # in `taken`, of the next decision to take over

    def replay(self) -> "Decisions":
        """From here on, take the decisions over, from the first one on."""
        self.place = 0
        return self

    def operator(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        plain = name.rstrip("_")
        if plain in STEPS and name.endswith("_"):  # the numbers are gone afterwards
            given = args[0].clone()
            return args[0].copy_(self._decide(name, func(*args, **kwargs), [given]))
        out = func(*args, **kwargs)
        if plain in INDEXED and isinstance(out, tuple):
            indices = self._decide(name, out[1], args)
            if plain not in PICKS:
                return out[0], indices
            return (out[0] if indices is out[1] else _picked(plain, args, kwargs, indices)), indices
        if not isinstance(out, Tensor) or not any(map(_continuous, args)):
            return out
        decides = not out.is_floating_point() and not out.is_complex()
        if not decides and plain not in STEPS:
            return out
        return self._decide(name, out, args)

    def _decide(self, name: str, own: Tensor, args: Any) -> Tensor:
        """The decision that counts: this one, or the one taken at this place before."""
        numbers = [arg for arg in args if _continuous(arg) and isinstance(arg, Tensor)]
        if self.place is None:
            self.taken.append((name, own.clone(), [number.clone() for number in numbers]))
            return own
        if self.place >= len(self.taken):
            return own
        known, taken, before = self.taken[self.place]
        self.place += 1
        # Over channels of which some are gone, each decides for itself.
        fits = taken.shape == own.shape or name in COUNTS
        fits &= [t.shape for t in before] == [t.shape for t in numbers]
        if known != name or not fits:
            return own
        self.apart += [(a, b.clone()) for a, b in zip(before, numbers, strict=True)]
        return taken.clone()


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
