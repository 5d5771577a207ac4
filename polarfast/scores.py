"""What channels are compared by: |γ|, or scores that users give; and their order."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .scaling import ScalingFactors
from .sharded import whole


def magnitudes(
    scales: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What is compared with a threshold: |γ|, or the given scores. Float32 on the CPU. Sharded γ
    are gathered in one collective.

    Raises:
        ArgumentError: `scores` are not one finite number >= 0 for each γ.
    """
    if scores is None:
        gammas = whole({name: gamma.detach() for name, gamma in scales.items()})
        return {name: gamma.abs().float().cpu() for name, gamma in gammas.items()}
    _check_names(scales, scores)
    found = {}
    for name, gamma in scales.items():
        score = scores[name]
        if not isinstance(score, Tensor) or score.shape != gamma.shape:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ArgumentError(f"scores[{name!r}]: give a tensor {list(gamma.shape)}, not {got}")
        score = score.detach().float().cpu().contiguous()
        if not bool((score.isfinite() & (score >= 0)).all()):
            raise ArgumentError(
                f"scores[{name!r}] holds negative, infinite or NaN values: a score is a finite "
                "number >= 0, the higher the more worth keeping"
            )
        found[name] = score
    return found


def _check_names(scales: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
    for name in scores:
        if name not in scales:
            raise ArgumentError(f"scores[{name!r}]: no such layer among the scaling factors")
    for name in scales:
        if name not in scores:
            raise ArgumentError(f"scores lack {name!r}: give one for every layer of scales")


def as_factors(scores: Mapping[str, Tensor]) -> ScalingFactors:
    """Scores in the place of scaling factors, so that thresholds can be chosen for them."""
    params = {name: nn.Parameter(score, requires_grad=False) for name, score in scores.items()}
    return ScalingFactors(params)


class Ranking:
    """All channels of the network, weakest first.

    Equal scores are told apart so that each layer gives the same share of its channels with that
    score, its last channels first. Then any number of channels can go, also where scores are equal.

    Attributes:
        places: name -> float32 [C], the place of each channel in the order, from 1 on.
        count: number of channels.
    """

    def __init__(
        self, compared: Mapping[str, Tensor], valleys: Mapping[str, float | None] | None = None
    ) -> None:
        """From `magnitudes`; with `valleys`, all that lies above its layer's valley comes after all
        that does not.
        """
        self._compared, self._valleys = compared, valleys
        score = torch.cat(list(compared.values()))
        turn = torch.cat([_turn(values) for values in compared.values()])
        order = turn.argsort(stable=True)
        order = order[score[order].argsort(stable=True)]
        if valleys is not None:
            above = torch.cat([v > _bound(valleys[name]) for name, v in compared.items()])
            order = order[above[order].long().argsort(stable=True)]
            self._under = int((~above).sum())
        self.count = score.numel()
        self._sorted = score[order]
        places = torch.empty(self.count, dtype=torch.float32, device="cpu")
        places[order] = torch.arange(1, self.count + 1, dtype=torch.float32, device="cpu")
        sizes = [values.numel() for values in compared.values()]
        self.places = dict(zip(compared, places.split(sizes), strict=True))

    def bounds(self, count: int) -> dict[str, float | None]:
        """Thresholds on `places` that remove so many of the weakest."""
        return dict.fromkeys(self._compared, count + 0.5 if count else None)

    def thresholds(self, count: int) -> dict[str, float | None]:
        """The same in units of what was ranked; equal ones may be on both sides of these."""
        if count == 0:
            return dict.fromkeys(self._compared, None)
        bound = float(self._sorted[count - 1])
        if self._valleys is None:
            return dict.fromkeys(self._compared, bound)
        if count <= self._under:
            return {n: None if v is None else min(v, bound) for n, v in self._valleys.items()}
        return {n: bound if v is None else max(v, bound) for n, v in self._valleys.items()}

    def above_valleys(self, count: int) -> dict[str, int]:
        """name -> how many of the `count` weakest lie above their layer's valley."""
        if self._valleys is None:
            return dict.fromkeys(self._compared, 0)
        return {
            name: int(((values > _bound(self._valleys[name])) & (self.places[name] <= count)).sum())
            for name, values in self._compared.items()
        }

    def ties(self, count: int) -> dict[str, int]:
        """name -> how many stay though they equal the last of the `count` that go."""
        if count == 0:
            return dict.fromkeys(self._compared, 0)
        bounds = self.thresholds(count)
        return {
            name: int(((values <= _bound(bounds[name])) & (self.places[name] > count)).sum())
            for name, values in self._compared.items()
        }


def _bound(threshold: float | None) -> float:
    return -1.0 if threshold is None else threshold


def _turn(values: Tensor) -> Tensor:
    """For each channel, the share of its layer's channels of the same score that go before it or
    with it, the last first.
    """
    order = values.flip(0).argsort(stable=True)
    value = values.flip(0)[order]
    _, sizes = value.unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rank = torch.arange(1, values.numel() + 1, device="cpu") - starts
    turn = torch.empty(values.numel(), dtype=torch.float64, device="cpu")
    turn[order] = rank.double() / sizes.repeat_interleave(sizes)
    return turn.flip(0)
