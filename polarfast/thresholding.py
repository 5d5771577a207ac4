"""Thresholds: below which γ a channel is pruned, layer by layer (Sec. 3.3) or for all at once."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .binding import Binding
from .errors import ArgumentError, ScalingFactorError, ThresholdError
from .sharded import whole

if TYPE_CHECKING:
    from .scaling import ScalingFactors

METHODS = ("valley", "fixed", "percentile")


def thresholds(
    scales: ScalingFactors, method: str = "valley", value: float | None = None
) -> dict[str, float | None]:
    """The threshold of each layer: channels with |γ| ≤ threshold are to be pruned.

    - "valley" (Sec. 3.3): the first local minimum of the layer's histogram of γ, 100 bins over
      [0, 1], the bins of `numpy.histogram`. None where the histogram has no valley: such a layer
      keeps all its channels. A threshold is the left edge of a bin, in units of γ.
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
