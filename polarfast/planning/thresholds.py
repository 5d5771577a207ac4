"""Thresholds: below which γ a channel is pruned, layer by layer (Sec. 3.3) or for all at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ScalingFactorError, ThresholdError
from ..scaling.factors import ScalingFactors
from ..sharding import on_cpu, whole
from ..stepping.binding import Binding
from .limits import bound_of

METHODS = ("valley", "fixed", "percentile")


def thresholds(
    scales: ScalingFactors, method: str = "valley", value: float | None = None
) -> dict[str, float | None]:
    """The threshold of each layer: channels with |γ| ≤ threshold are to be pruned.

    - "valley" (Sec. 3.3): the first local minimum of the layer's histogram of γ, 100 bins over
      [0, 1]. None where the histogram has no valley: such a layer keeps all its channels. A
      threshold is the left edge of a bin, in units of γ. The bins are those of
      ``numpy.histogram(γ.astype(float32), 100, (0, 1))``: edge i is float32(0.01·i), the last bin
      is closed on the right, and float64 γ are counted as the float32 next to them; a γ is compared
      with the threshold as it is.
    - "fixed": `value` (0.01 by default) for all layers, on |γ|.
    - "percentile": one threshold for all layers such that `value`, a share of all n channels, is
      cut; None where that is no channel at all. |γ| equal to the threshold are cut with it, so
      more than `value` may go: a warning says how many.

    "fixed" and "percentile" take any sign of γ and suit `pf.L1` and `pf.DeepHoyer`.

    Args:
        scales: the scaling factors γ; on a GPU, "valley" makes one copy to the host. Sharded ones
            (`fully_shard`) are gathered in one collective, so every process must ask.
        method: "valley", "fixed" or "percentile".
        value: see above; not for "valley".

    Returns:
        Name of γ -> threshold (exact in the dtype of γ, or float32), or None: nothing to prune.

    Raises:
        ThresholdError: a γ is NaN or infinite, or negative with "valley"; names the layer.
        ArgumentError: an unknown method, or a `value` out of its range.
        ScalingFactorError: there are no scaling factors.
    """
    check_any(scales)
    value = check_method(method, value)
    if method == "valley":
        return {name: threshold for name, (threshold, _) in valleys(scales).items()}
    if method == "fixed":
        check_finite(scales)
        return dict.fromkeys(scales, value)
    return _percentile(scales, value)


def check_method(method: str, value: float | None) -> float:
    """The `value` that `thresholds` goes by, 0 for "valley"; no γ is looked at.

    Raises:
        ArgumentError: an unknown method, or a `value` out of its range.
    """
    if method == "valley":
        if value is not None:
            raise ArgumentError(f"value={value!r}: 'valley' finds its own; leave value out")
        return 0.0
    if method == "fixed":
        value = 0.01 if value is None else value
        if not 0.0 <= value < math.inf:
            raise ArgumentError(
                f"value={value!r}: a fixed threshold on |γ| is a finite number >= 0"
            )
        return float(value)
    if method == "percentile":
        if value is None or not 0.0 <= value < 1.0:
            raise ArgumentError(
                f"value={value!r}: 'percentile' needs the share of channels to cut, in [0, 1)"
            )
        return float(value)
    raise ArgumentError(f"method={method!r}: choose one of {', '.join(map(repr, METHODS))}")


def valleys(scales: ScalingFactors) -> dict[str, tuple[float | None, int]]:
    """Name of γ -> its "valley" threshold, and how many γ are above it (all, if there is none)."""
    summary, counts = Binding.of(scales).table(None).valley()
    counted = counts.sum(dim=1, keepdim=True).to(summary.dtype)
    found: dict[str, tuple[float | None, int]] = {}
    rows = torch.cat((summary, counted), dim=1).tolist()
    for (name, gamma), row in zip(scales.items(), rows, strict=True):
        threshold, above, not_finite, inside = row
        if not_finite:
            raise _not_finite(name, gamma, int(not_finite))
        if inside < gamma.numel():  # some are outside [0, 1]; above 1 is harmless
            negative = int((whole({name: gamma.detach()})[name] < 0).sum())
            if negative:
                raise ThresholdError(
                    f"{name!r} has {negative} negative γ of {gamma.numel()}, and 'valley' looks at "
                    "[0, 1] only: train with upper= set, so that γ are clamped, or use "
                    "method='percentile' or 'fixed', which compare |γ|"
                )
        found[name] = (None if math.isnan(threshold) else threshold, int(above))
    return found


def check_finite(scales: ScalingFactors) -> None:
    """Raise ThresholdError, which names the layer, if a γ is NaN or infinite, and
    ScalingFactorError if there is none.
    """
    check_any(scales)
    _magnitudes(scales)


def check_any(scales: ScalingFactors) -> None:
    """Raise ScalingFactorError unless there are scaling factors."""
    if not scales:
        raise ScalingFactorError("there are no scaling factors to choose a threshold for")


def _percentile(scales: ScalingFactors, value: float) -> dict[str, float | None]:
    magnitudes = _magnitudes(scales)
    n = magnitudes.numel()
    wanted = math.floor(round(value * n, 6))  # 0.29 of 100 is 29, not 28.999999999999996
    if wanted == 0:
        return dict.fromkeys(scales, None)
    threshold = magnitudes.kthvalue(wanted).values
    cut, bound = torch.stack(
        ((magnitudes <= threshold).sum().double(), threshold.double())
    ).tolist()
    if cut > wanted:
        warnings.warn(
            f"percentile {value:g} asks for {wanted} of {n} channels, but {int(cut)} have "
            f"|γ| <= {bound:g} and are cut together: γ that are equal cannot be told apart",
            stacklevel=3,
        )
    return dict.fromkeys(scales, bound)


def _magnitudes(scales: ScalingFactors) -> Tensor:
    """|γ| of all layers, 1-D, in float32 or better; all of them finite."""
    with torch.no_grad():
        gammas = whole(scales)
        magnitudes = torch.cat([gamma.reshape(-1) for gamma in gammas.values()]).abs()
    if not bool(magnitudes.isfinite().all()):
        for name, gamma in gammas.items():
            count = int((~gamma.detach().isfinite()).sum())
            if count:
                raise _not_finite(name, gamma, count)
    return magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))


def _not_finite(name: str, gamma: Tensor, count: int) -> ThresholdError:
    return ThresholdError(
        f"{name!r} has {count} NaN or infinite γ of {gamma.numel()}: training diverged before "
        "this; go back to an earlier checkpoint, and lower the learning rate or λ"
    )


def magnitudes(
    scales: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What is compared with a threshold: |γ|, or the given scores. Float32 on the CPU. Sharded γ
    are gathered in one collective.

    Raises:
        ArgumentError: `scores` are not one finite number >= 0 for each γ.
    """
    if scores is None:
        return {name: gamma.abs() for name, gamma in on_cpu(scales).items()}
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
            above = torch.cat([v > bound_of(valleys[name]) for name, v in compared.items()])
            order = order[above[order].long().argsort(stable=True)]
            self._under = int((~above).sum())
        self.count = score.numel()
        self._sorted = score[order]
        places = torch.empty(self.count, dtype=torch.float32, device="cpu")
        places[order] = torch.arange(1, self.count + 1, dtype=torch.float32, device="cpu")
        sizes = [values.numel() for values in compared.values()]
        self.places = dict(zip(compared, places.split(sizes), strict=True))

    def ends(self) -> tuple[dict[str, int], dict[str, int]]:
        """name -> the layer's channel that goes last; and the one that goes first."""
        last = {name: int(places.argmax()) for name, places in self.places.items()}
        return last, {name: int(places.argmin()) for name, places in self.places.items()}

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
            name: int(
                ((values > bound_of(self._valleys[name])) & (self.places[name] <= count)).sum()
            )
            for name, values in self._compared.items()
        }

    def ties(self, count: int) -> dict[str, int]:
        """name -> how many stay though they equal the last of the `count` that go."""
        bounds = self.thresholds(count)
        return {
            name: int(((values <= bound_of(bounds[name])) & (self.places[name] > count)).sum())
            for name, values in self._compared.items()
        }


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
