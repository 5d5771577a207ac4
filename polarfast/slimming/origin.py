"""Where the positions of a slim model's tensors lie in those of the original: the way back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import tensors_of_model
from ..documents import check_fields, list_of, mapping_of, short, text
from ..errors import PlanError
from ..planning.pruning_plan import MOST_CHANNELS, positions, ranges
from ..tracing.classes import Channels
from .structure import Layout, Structure

#: Dimension -> positions kept; [groups, n] where each group of rows keeps others.
Kept = Mapping[int, Tensor]
#: Of all tensors, each channel being a position in about eight.
MOST_POSITIONS = 2 * MOST_CHANNELS
_DIMS = tuple(map(str, range(64)))
_FIELDS = {
    "index": mapping_of(mapping_of(lambda pairs: isinstance(pairs, list))),
    "ones": list_of(text),
    "put_back": mapping_of(text),
    "created": list_of(text),
}


@dataclass
class Origin:
    """What is needed to write a slim model's tensors into the model that it was made from, which
    then computes the same: its removed channels have γ = β = 0 and nobody reads them.

    Attributes:
        index: tensor name -> `Kept`, of tensors that have lost positions.
        ones: names of tensors that are 1 where nothing was kept (running variances).
        put_back: name of a norm's bias -> buffer of the slim model that holds what the norm's
            removed channels were.
        created: tensors of the slim model that the original does not have.
    """

    index: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    ones: list[str] = field(default_factory=list)
    put_back: dict[str, str] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, layout: Layout, channels: Channels, structure: Structure) -> "Origin":
        """The way back of a slim model with this layout and structure."""
        constants = {}
        for weight in sorted(channels.boundaries):
            bias, prefix = channels.calls[weight].bias, weight.rpartition(".")[0]
            change = structure.modules.get(prefix)
            if bias is not None and change is not None and change.put_back is not None:
                constants[bias] = f"{prefix}.put_back_constant".lstrip(".")
        return cls(
            index={name: dict(layout.index(name)) for name in layout.changed()},
            ones=[norm.var for norm in layout.graph.norms if norm.var and layout.index(norm.var)],
            put_back=constants,
            created=[f"{n}.bias" if n else "bias" for n, c in structure.modules.items() if c.bias],
        )

    def after(self, first: "Origin") -> "Origin":
        """The way back from this slim model over the one that it was made from, to the original."""
        index = {name: dict(kept) for name, kept in first.index.items()}
        for name, kept in self.index.items():
            mine = index.setdefault(name, {})
            for dim, places in kept.items():
                mine[dim] = _chain(mine[dim], places) if dim in mine else places
        return Origin(
            index,
            sorted({*first.ones, *self.ones}),
            {**self.put_back, **first.put_back},
            sorted({*first.created, *self.created}),
        )

    def spread(self, name: str, small: Tensor, full: Tensor) -> Tensor:
        """A tensor of the slim model at its places in one of the original's shape, 0 elsewhere (1
        for running variances).

        Args:
            small: shaped like the slim model's tensor of that name. full: like the original's.
        """
        kept = self.index.get(name)
        if not kept:
            return small.to(full)
        rest = 1.0 if name in self.ones else 0.0
        small = small.to(full)
        for dim in sorted(kept):  # rows first: groups of columns are counted by them
            shape = list(small.shape)
            shape[dim] = full.shape[dim]
            grown = full.new_full(shape, rest)
            places = kept[dim].to(full.device)
            rows = places if places.dim() == 2 and dim else places.reshape(1, -1)
            parts = zip(grown.chunk(len(rows)), small.chunk(len(rows)), rows, strict=True)
            for into, part, row in parts:
                into.index_copy_(dim, row, part)
            small = grown
        return small

    @torch.no_grad()
    def write_back(self, slim: nn.Module, model: nn.Module) -> None:
        """Give the original the slim model's tensors, in place.

        Raises:
            PlanError: the slim model has a tensor that the original lacks (a bias that was made for
                what removed channels leave behind).
        """
        if self.created:
            raise PlanError(
                f"the slim model has a bias that the original lacks ({self.created[0]}), so the "
                "original cannot compute the same"
            )
        tensors, small = tensors_of_model(model), tensors_of_model(slim)
        for name, tensor in tensors.items():
            full = self.spread(name, small[name].detach(), tensor)
            if name in self.put_back:
                constant = small[self.put_back[name]].detach().to(full)
                gone = torch.ones_like(full, dtype=torch.bool)
                gone[self.index[name][0].to(full.device)] = False
                full = torch.where(gone, constant, full)
            tensor.copy_(full)

    @torch.no_grad()
    def write_vectors(self, slim: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """The same for some vectors, as γ and β, by name; those of layers that are gone are 0."""
        for name, tensor in into.items():
            tensor.copy_(self.spread(name, slim[name].detach(), tensor.detach()))

    @torch.no_grad()
    def restore_optimizer(
        self, optimizer: torch.optim.Optimizer, slim: nn.Module, model: nn.Module
    ) -> None:
        """The inverse of `migrate_optimizer`: its groups and state are the original's, in place,
        and 0 for what was removed.
        """
        names = {param: name for name, param in slim.named_parameters()}
        params = dict(model.named_parameters())
        state: dict[Tensor, Any] = {}
        for param, values in optimizer.state.items():
            name = names[param]  # type: ignore[index]
            full = params[name]
            state[full] = {
                key: self.spread(name, value, full.detach().to(value.dtype))
                if isinstance(value, Tensor) and value.dim()
                else value
                for key, value in values.items()
            }
        for group in optimizer.param_groups:
            group["params"] = [params[names[param]] for param in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(state)

    def to_data(self) -> dict[str, Any]:
        """As plain JSON data."""
        index = {
            name: {str(dim): _to_ranges(places) for dim, places in kept.items()}
            for name, kept in self.index.items()
        }
        return {
            "index": index,
            "ones": self.ones,
            "put_back": self.put_back,
            "created": self.created,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> "Origin":
        """The inverse of `to_data`.

        Args:
            shapes: of the slim model's tensors: as many positions are kept.

        Raises:
            ValueError: other numbers of positions are, or this is no such data.
        """
        check_fields(data, _FIELDS, "the way back")
        left = MOST_POSITIONS
        for name, kept in data["index"].items():
            if name not in shapes or not all(d in _DIMS[: len(shapes[name])] for d in kept):
                raise ValueError(f"the way back of {short(name)} is of another tensor")
            left -= sum(shapes[name][int(d)] * _rows(places) for d, places in kept.items())
            if left < 0:
                raise ValueError(f"the way back has more than {MOST_POSITIONS:,} positions")
        index = {
            name: {
                int(dim): _from_ranges(places, shapes[name][int(dim)], name)
                for dim, places in kept.items()
            }
            for name, kept in data["index"].items()
        }
        return cls(index, data["ones"], data["put_back"], data["created"])


def _to_ranges(places: Tensor) -> list[Any]:
    """Ascending numbers as [first, last] pairs; a list of these for each group of rows."""
    return (
        [ranges(row) for row in places.tolist()] if places.dim() == 2 else ranges(places.tolist())
    )


def _grouped(pairs: list[Any]) -> bool:
    """Whether these are pairs for each group of rows."""
    first = pairs[0] if pairs else None
    return isinstance(first, list) and all(isinstance(each, list) for each in first)


def _rows(pairs: list[Any]) -> int:
    return len(pairs) if _grouped(pairs) else 1


def _from_ranges(pairs: list[Any], count: int, name: str) -> Tensor:
    what = f"the way back of {name}"
    if _grouped(pairs):
        rows = [row if isinstance(row, list) else [row] for row in pairs]
        return torch.stack([positions(row, MOST_CHANNELS, what, count) for row in rows])
    return positions(pairs, MOST_CHANNELS, what, count)


def _chain(first: Tensor, second: Tensor) -> Tensor:
    """Places in the original of what a second cut keeps of the first."""
    if first.dim() == second.dim() == 1:
        return first[second.to(first.device)]
    groups = len(first) if first.dim() == 2 else len(second)
    wide = [each if each.dim() == 2 else each.expand(groups, -1) for each in (first, second)]
    return wide[0].gather(1, wide[1].to(first.device))
