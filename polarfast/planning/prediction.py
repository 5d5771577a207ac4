"""The share of MACs that a plan made now would cut, from γ and β alone: `CutPredictor`."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..folding.fold import check_fold
from ..inputs import unwrap
from ..scaling.factors import ScalingFactors
from ..sharding import is_sharded, present_parameters, whole
from ..tracing.classes import trace_channels
from ..tracing.meaning import inputs_of
from .costs import Latencies, check_of, whole_steps
from .counting import CutCounter, Moment, full
from .limits import Counts, Limits, Shares
from .plan import check_belongs, check_scales
from .thresholds import as_factors, check_any, check_method, magnitudes, thresholds, valleys


class CutPredictor:
    """Predicts `plan(...).flops_reduction`, or the share of another cost, from the γ of the moment,
    without tracing again.

    The network is traced once. `cut()` then counts channels over their thresholds and looks the
    MACs up: about 0.1 ms for a ResNet-20, 0.2 ms for a ResNet-50 on one core. It counts constant
    channels, too, from the sign of β. Where the answer is not that simple (coupled
    channels, limits, a layer that has to be given a channel back) it goes the
    way that `plan` goes, in milliseconds.

    Args:
        model, example_inputs, scales, method, round_to, min_channels, max_share, value, fold,
            latency: as in `plan`.
        of: what the share is of: "macs", "params" (without the biases that constants may call for)
            or "latency". The latter two take milliseconds.

    Attributes:
        macs_before: multiply-accumulates of the whole network on the example inputs.
        model: the network, its wrappers left out.

    Raises:
        ArgumentError, PlanError, TracingError: as in `plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        scales: ScalingFactors,
        method: str = "valley",
        *,
        value: float | None = None,
        fold: str = "exact",
        round_to: Counts = 1,
        min_channels: Counts = 1,
        max_share: Shares | None = None,
        of: str = "macs",
        latency: Latencies | None = None,
    ) -> None:
        check_scales("pf.CutPredictor", scales)
        check_of(of, latency)
        if latency is not None:
            latency.check_inputs(example_inputs)
            round_to = whole_steps(round_to, latency)
        check_fold(fold)
        check_any(scales)
        sizes = {name: gamma.numel() for name, gamma in scales.items()}
        limits = Limits.of(sizes, round_to, min_channels, max_share)
        self.scales, self.method, self.value, self.fold = scales, method, value, fold
        self.model = unwrap(model)
        channels = trace_channels(
            self.model, example_inputs, scales.residual, with_operations=latency is not None
        )
        check_belongs(self.model, channels, scales)
        check_method(method, value)  # and no γ: what they are now may be clamped before a look
        self._names = list(scales)
        self._sizes = [scales[name].numel() for name in scales]
        self._counter = CutCounter(
            self.model,
            channels,
            inputs_of(self.model, example_inputs),
            self._names,
            fold=fold,
            limits=limits,
            of=of,
            latency=latency,
        )
        self.of = of
        self.macs_before = self._counter.macs_before
        params: dict[str, Tensor] = dict(self.model.named_parameters())
        self._beta = {name: params[bias] for name, bias in self._counter.readers.items()}
        self._beta_now: Mapping[str, Tensor] = self._beta  # sharded ones as they were last gathered

    def cut(self, scores: Mapping[str, Tensor] | None = None) -> float:
        """The share of MACs (or of `of`) that a plan made now would cut.

        Args:
            scores: as in `plan`; by default, |γ| decides.

        Raises:
            ArgumentError: `scores` do not fit.
            ThresholdError: as in `thresholds`.
        """
        first = next(iter(self.scales.values()))
        if scores is None and self.method == "valley" and self._counter.quick and _plain(first):
            found = valleys(self.scales)
            limits = {name: threshold for name, (threshold, _) in found.items()}
            moment = Moment(self.scales, self._beta_now, limits)
            return self._counter.share_of(moment, [above for _, above in found.values()])
        compared = self.look(scores)
        factors = self.scales if scores is None and _plain(first) else as_factors(compared)
        return self._compare(compared, thresholds(factors, self.method, self.value))

    def rebind(self, scales: ScalingFactors) -> None:
        """Follow parameters that were replaced in the same model since, as `fully_shard` and
        `load_state_dict(assign=True)` do. Once they are sharded, all processes must rebind and
        predict together.

        Args:
            scales: `scales.rebind(model)`; those left out by `select` may be missing.

        Raises:
            ArgumentError: a factor is missing, or is no parameter of this model; or the prediction
                takes passes through the network, which is now sharded.
        """
        known = {**scales.others, **scales}
        for name in self._names:
            if name not in known:
                raise ArgumentError(f"scales lack {name!r}, which is predicted to be pruned too")
        if all(known[name] is self.scales[name] for name in self._names):
            return
        present = present_parameters(self.model)
        for name in self._names:
            if present.get(name) is not known[name]:
                raise ArgumentError(
                    f"{name!r} is no parameter of the model that this prediction was made for: "
                    "make it anew, from the model that is trained (before it is sharded)"
                )
        if any(is_sharded(known[name]) for name in self._names):
            self._counter.check_needs_no_pass()
        self.scales = ScalingFactors(
            {name: known[name] for name in self._names}, residual=self.scales.residual
        )
        self._beta = {name: present[bias] for name, bias in self._counter.readers.items()}
        self.look()  # sharded β made whole, for predictions from other numbers than γ

    def leaks(self) -> dict[str, tuple[str, ...]]:
        """Layers whose removed channels leave something behind that does not fold exactly: γ name
        -> names of the vectors that it comes from; see `folding.visibility.leaks`.
        """
        return self._counter.leaks()

    def watched(self) -> dict[str, Tensor]:
        """The parameters that a prediction reads, γ and β, by name."""
        return {
            **self.scales,
            **{self._counter.readers[name]: beta for name, beta in self._beta.items()},
        }

    def look(self, scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What is compared with thresholds: name -> float32 [C] on the CPU, for `cut_of` and
        `count_for`. Sharded γ and β are gathered, in one collective.

        Args:
            scores: as in `plan`; by default, |γ| decides.
        """
        gammas = {} if scores is not None else {n: g.detach() for n, g in self.scales.items()}
        betas = {self._counter.readers[name]: beta.detach() for name, beta in self._beta.items()}
        if any(map(is_sharded, self.scales.values())):
            found = whole({**gammas, **betas})
            gammas = {name: found[name] for name in gammas}
            betas = {name: found[name] for name in betas}
        self._beta_now = {name: betas[bias] for name, bias in self._counter.readers.items()}
        return magnitudes(gammas if scores is None else self.scales, scores)

    @property
    def guesses(self) -> bool:
        """Whether a rough prediction may be another one than that which takes milliseconds more."""
        return self._counter.guesses

    def cut_of(self, compared: Mapping[str, Tensor], roughly: bool = False) -> float:
        """As `cut`, from what `look` found.

        Args:
            roughly: where only a pass through the network tells whether removed channels leave a
                constant behind (coupled channels), guess it from the signs of β.
        """
        limits = thresholds(as_factors(compared), self.method, self.value)
        return self._compare(compared, limits, roughly)

    def count_for(
        self,
        cut: float,
        compared: Mapping[str, Tensor],
        usual: int = 0,
        slack: float = 0.0,
        held: Mapping[str, float | None] = MappingProxyType({}),
        order: Tensor | None = None,
    ) -> int:
        """How many of the weakest channels must go for the share of MACs closest to `cut`, roughly
        (as in `cut_of`).

        Args:
            cut: share of MACs.
            compared: name -> float [C] on the CPU, what channels are ranked by; those at infinity
                stay.
            usual: the answer if it is not worse than the best by more than `slack`.
            held: name -> threshold of layers that are not ranked with the others.
            order: `compared` of the layers that are ranked, 1-D and sorted, if that is at hand.
        """
        if order is None:
            ranked = [values for name, values in compared.items() if name not in held]
            order = torch.cat(ranked).sort().values
        share, usual = self._shares(compared, order, held), min(usual, order.numel())
        if usual and abs(share(usual) - cut) <= slack:
            return usual  # whatever the best may be
        low, high = 0, max(int(order.isfinite().sum()) - 1, 0)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) < cut else (low, middle)
        best = min(abs(share(low) - cut), abs(share(high) - cut))
        if usual and abs(share(usual) - cut) <= best + slack:
            return usual
        return low if abs(share(low) - cut) == best else high

    def _shares(
        self, compared: Mapping[str, Tensor], order: Tensor, held: Mapping[str, float | None]
    ) -> Callable[[int], float]:
        """The share of MACs cut as a function of how many of the weakest channels go, roughly."""
        moment = Moment(self.scales, self._beta_now, held, compared, roughly=True)

        @functools.cache
        def share(count: int) -> float:
            limit = float(order[count - 1]) if count else None
            limits = {**dict.fromkeys(self._names, limit), **held}
            return self._counter.share(replace(moment, limits=limits))

        return share

    def largest_cut(self, names: Collection[str] | None = None) -> float:
        """The share that is cut when every layer is cut as far as it can be; of the time, the
        largest of those on the way there.

        Args:
            names: of layers, if only these are cut.
        """
        parts = [0.0] if self.of != "latency" else [part / 8 for part in range(8)]
        return max(0.0, *(self._cut_to(part, names) for part in parts))

    def _cut_to(self, part: float, names: Collection[str] | None) -> float:
        """The share that is cut when this part of each layer stays."""
        left = {}
        for name, size in zip(self._names, self._sizes, strict=True):
            whole_layer = names is not None and name not in names
            left[name] = full(size, 1.0 if whole_layer else 0.0)
            left[name][: math.ceil(part * size)] = 1.0
        return self._compare(left, dict.fromkeys(self._names, 0.0))

    def layers_that_stay(self) -> set[int]:
        """Rows of the layers that cannot be emptied, even if all others stay whole."""
        return {row for row in range(len(self._names)) if self._counter.stays(row)}

    def _compare(
        self,
        compared: Mapping[str, Tensor],
        limits: Mapping[str, float | None],
        roughly: bool = False,
    ) -> float:
        return self._counter.share(Moment(self.scales, self._beta_now, limits, compared, roughly))


def _plain(gamma: Tensor) -> bool:
    """Whether γ are compared as they are: not sharded, and not in more than single precision."""
    return gamma.dtype != torch.float64 and not is_sharded(gamma)
