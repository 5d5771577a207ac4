"""`CutPredictor`: the share of MACs that `plan` would cut now, cheap enough for every step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .constants import UNKNOWN, VISIBLE, Answers, ranges, visibility
from .errors import ArgumentError
from .fields import Fold
from .folding import fold_constants
from .inputs import describe, unwrap
from .planning import (
    as_factors,
    can_vanish,
    check_belongs,
    check_limits,
    magnitudes,
    select,
)
from .scaling import ScalingFactors, analyze
from .selection import Selection
from .sharded import is_sharded, present_parameters, whole
from .thresholding import thresholds, valleys
from .widths import Widths, shares_channels

#: What a β says where only positive constants get through, as behind a ReLU.
POSITIVE: Answers = (0, 0, 0, VISIBLE, VISIBLE)


@dataclass(frozen=True, eq=False)
class _Regime:
    """What follows from some layers' being emptied.

    Attributes:
        dropped: rows of the layers that go with them, and theirs: nothing reads them any more.
        rows: layers that may need a constant channel.
        answers: for each of these, what a removed channel's β says.
        positive: whether that is always: a constant channel, if β > 0.
    """

    dropped: frozenset[int]
    rows: tuple[int, ...]
    answers: tuple[Answers, ...]
    positive: bool


class CutPredictor:
    """Predicts `plan(...).flops_reduction` from the γ of the moment, without tracing again.

    The network is traced once. `cut()` then counts channels over their thresholds and looks the
    MACs up: about 0.1 ms for a ResNet-20, 0.2 ms for a ResNet-50 on one core. It counts constant
    channels, too, from the sign of β. Where the answer is not that simple (coupled
    channels, `round_to`, `min_channels`, a layer that has to be given a channel back) it goes the
    way that `plan` goes, in milliseconds.

    Args:
        model, example_inputs, scales, method, round_to, min_channels, value, fold: as in `plan`.

    Attributes:
        macs_before: multiply-accumulates of the whole network on the example inputs.

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
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        check_limits(round_to, min_channels, fold)
        self.scales, self.method, self.value, self.fold = scales, method, value, fold
        self.round_to, self.min_channels = round_to, min_channels
        self._model = unwrap(model)
        self._channels = analyze(self._model, example_inputs, scales.residual)
        check_belongs(self._model, self._channels, scales)
        thresholds(scales, method, value)  # the method's name and value are checked
        self._spec = describe(example_inputs)
        self._names = list(scales)
        self._sizes = [scales[name].numel() for name in scales]
        self._vanishing = can_vanish(self._model, self._channels)
        self._seen = visibility(self._model, self._channels, self._names, self._spec, fold)
        params: dict[str, Tensor] = dict(self._model.named_parameters())
        biases = {name: self._channels.calls[name].bias for name in self._seen.readers}
        self._beta_names = {name: bias for name, bias in biases.items() if bias is not None}
        self._beta = {name: params[bias] for name, bias in self._beta_names.items()}
        self._beta_now: Mapping[str, Tensor] = self._beta  # sharded ones as they were last gathered
        self._counted = [c for c in self._channels.graph.projections if c.counted]
        self.macs_before = self._macs(~self._channels.graph.mask())
        self._shared = shares_channels(self._channels, self._names)
        limited = (round_to, min_channels) != (1, 1) or min(self._sizes) < 2
        self._widths = None if self._shared or limited else Widths.of(self._channels, self._names)
        self._regimes: dict[tuple[int, ...], _Regime | None] = {}
        self._tables: dict[tuple[_Regime, torch.device], tuple[Tensor, Tensor]] = {}

    def cut(self, scores: Mapping[str, Tensor] | None = None) -> float:
        """The share of MACs that a plan made now would cut.

        Args:
            scores: as in `plan`; by default, |γ| decides.

        Raises:
            ArgumentError: `scores` do not fit.
            ThresholdError: as in `thresholds`.
        """
        first = next(iter(self.scales.values()))
        if scores is None and self.method == "valley" and self._widths and _plain(first):
            found = valleys(self.scales)
            limits = {name: threshold for name, (threshold, _) in found.items()}
            return self._share(None, limits, [above for _, above in found.values()])
        compared = self.look(scores)
        factors = self.scales if scores is None and _plain(first) else as_factors(compared)
        return self._compare(compared, thresholds(factors, self.method, self.value))

    def percentile_for(self, cut: float, scores: Mapping[str, Tensor] | None = None) -> float:
        """The `value` for method="percentile" whose plan comes closest to cutting this share.

        Args:
            cut: share of MACs, in [0, 1).
            scores: as in `plan`.

        Raises:
            ArgumentError: `cut` is out of its range, or `scores` do not fit.
        """
        if not 0.0 <= cut < 1.0:
            raise ArgumentError(f"cut={cut!r}: give a share of the MACs, in [0, 1)")
        return self.count_for(cut, self.look(scores)) / self.scales.numel()

    def rebind(self, scales: ScalingFactors) -> None:
        """Follow parameters that were replaced in the same model since, as `fully_shard` and
        `load_state_dict(assign=True)` do. Once they are sharded, all processes must predict
        together.

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
        present = present_parameters(self._model)
        for name in self._names:
            if present.get(name) is not known[name]:
                raise ArgumentError(
                    f"{name!r} is no parameter of the model that this prediction was made for: "
                    "make it anew, from the model that is trained (before it is sharded)"
                )
        if any(is_sharded(known[name]) for name in self._names):
            self._check_needs_no_pass()
        self.scales = ScalingFactors(
            {name: known[name] for name in self._names}, residual=self.scales.residual
        )
        self._beta = {name: present[bias] for name, bias in self._beta_names.items()}
        self._beta_now = self._beta

    def look(self, scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What is compared with thresholds: name -> float32 [C] on the CPU, for `cut_of` and
        `count_for`. Sharded γ and β are gathered, in one collective.

        Args:
            scores: as in `plan`; by default, |γ| decides.
        """
        gammas = {} if scores is not None else {n: g.detach() for n, g in self.scales.items()}
        betas = {self._beta_names[name]: beta.detach() for name, beta in self._beta.items()}
        if any(map(is_sharded, self.scales.values())):
            found = whole({**gammas, **betas})
            gammas = {name: found[name] for name in gammas}
            betas = {name: found[name] for name in betas}
        self._beta_now = {name: betas[bias] for name, bias in self._beta_names.items()}
        return magnitudes(gammas if scores is None else self.scales, scores)

    def cut_of(self, compared: Mapping[str, Tensor]) -> float:
        """As `cut`, from what `look` found."""
        return self._compare(compared, thresholds(as_factors(compared), self.method, self.value))

    def count_for(
        self,
        cut: float,
        compared: Mapping[str, Tensor],
        usual: int = 0,
        slack: float = 0.0,
        held: Mapping[str, float | None] = MappingProxyType({}),
    ) -> int:
        """How many of the weakest channels must go for the share of MACs closest to `cut`.

        Args:
            cut: share of MACs.
            compared: name -> float [C] on the CPU, what channels are ranked by; those at infinity
                stay.
            usual: the answer if it is not worse than the best by more than `slack`.
            held: name -> threshold of layers that are not ranked with the others.
        """
        ranked = [values for name, values in compared.items() if name not in held]
        order = torch.cat(ranked).sort().values

        def share(count: int) -> float:
            limit = float(order[count - 1]) if count else None
            return self._compare(compared, {**dict.fromkeys(self._names, limit), **held})

        low, high = 0, max(int(order.isfinite().sum()) - 1, 0)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) < cut else (low, middle)
        best = min(abs(share(low) - cut), abs(share(high) - cut))
        if usual and abs(share(usual) - cut) <= best + slack:
            return usual
        return low if abs(share(low) - cut) == best else high

    def largest_cut(self, names: Collection[str] | None = None) -> float:
        """The share of MACs cut when every layer is cut as far as it can be.

        Args:
            names: of layers, if only these are cut.
        """
        left = {
            name: torch.full((size,), float(names is not None and name not in names))
            for name, size in zip(self._names, self._sizes, strict=True)
        }
        return self._compare(left, dict.fromkeys(self._names, 0.0))

    def layers_that_stay(self) -> set[int]:
        """Rows of the layers that cannot be emptied, even if all others stay whole."""
        return {row for row in range(len(self._names)) if self._find_regime((row,)) is None}

    # --- the quick way

    def _compare(self, compared: Mapping[str, Tensor], limits: Mapping[str, float | None]) -> float:
        if self._widths is None:
            return self._by_selection(compared, limits)
        bounds = torch.tensor([_bound(limits[name]) for name in self._names])
        sizes = torch.tensor(self._sizes)
        above = torch.cat(list(compared.values())) > bounds.repeat_interleave(sizes)
        ends = torch.cat((torch.zeros(1, dtype=torch.long), above.cumsum(0)[sizes.cumsum(0) - 1]))
        return self._share(compared, limits, ends.diff().tolist())

    def _share(
        self,
        compared: Mapping[str, Tensor] | None,
        limits: Mapping[str, float | None],
        kept: list[int],
    ) -> float:
        """F from the channels kept in each layer; `compared`: None for |γ|."""
        empty = tuple(row for row, count in enumerate(kept) if count == 0)
        if empty and compared is None:
            compared = magnitudes(self.scales)
        if empty and compared is not None:
            strength = {row: float(compared[self._names[row]].max()) for row in empty}
            empty = tuple(sorted(empty, key=lambda row: -strength[row]))
        if empty not in self._regimes:
            self._regimes[empty] = self._find_regime(empty)
        regime = self._regimes[empty]
        extra = None if regime is None else self._extra(regime, compared, limits, kept)
        if regime is None or extra is None or self._widths is None:
            return self._by_selection(compared or magnitudes(self.scales), limits)
        widths = [0 if row in regime.dropped else count for row, count in enumerate(kept)]
        for row in extra:
            widths[row] += 1
        return 1.0 - self._widths.macs(widths) / self.macs_before

    def _extra(
        self,
        regime: _Regime,
        compared: Mapping[str, Tensor] | None,
        limits: Mapping[str, float | None],
        kept: list[int],
    ) -> list[int] | None:
        """Rows of the layers that need a constant channel; None: β alone do not tell."""
        names = [self._names[row] for row in regime.rows]
        if not names or all(kept[row] == self._sizes[row] for row in regime.rows):
            return []
        if compared is None:
            score = torch.cat([self.scales[name].detach() for name in names])  # none is negative
        else:
            score = torch.cat([compared[name] for name in names])
        rows, table = self._table(regime, score.device)
        bounds = [
            float("inf") if row in regime.dropped else _bound(limits[self._names[row]])
            for row in regime.rows
        ]
        gone = score <= score.new_tensor(bounds).index_select(0, rows)
        beta = torch.cat([self._beta_now[name].detach() for name in names]).to(score.device)
        if regime.positive:
            shows = torch.bincount(rows[gone & (beta > 0)], minlength=len(names)).tolist()
            return [row for row, count in zip(regime.rows, shows, strict=True) if count]
        answer = table[rows, ranges(beta)]
        shows = torch.bincount(rows[gone & (answer == VISIBLE)], minlength=len(names)).tolist()
        doubts = torch.bincount(rows[gone & (answer == UNKNOWN)], minlength=len(names)).tolist()
        if any(doubt and not show for show, doubt in zip(shows, doubts, strict=True)):
            return None
        return [row for row, count in zip(regime.rows, shows, strict=True) if count]

    def _table(self, regime: _Regime, device: torch.device) -> tuple[Tensor, Tensor]:
        """Index into `regime.rows` of each of these layers' channels; their answers [rows, 5]."""
        key = (regime, device)
        if key not in self._tables:
            sizes = torch.tensor([self._sizes[row] for row in regime.rows])
            rows = torch.arange(len(regime.rows)).repeat_interleave(sizes)
            self._tables[key] = rows.to(device), torch.tensor(regime.answers).to(device)
        return self._tables[key]

    def _check_needs_no_pass(self) -> None:
        """Raise ArgumentError if `_constants` may have to pass inputs through the network."""
        answers = [self._seen.answers(name) for name in self._seen.readers]
        if answers and (self._shared or any(UNKNOWN in each for each in answers)):
            raise ArgumentError(
                "the share of MACs that pruning cuts cannot be predicted while this model is "
                "sharded: whether removed channels leave a constant behind takes passes through "
                "the whole network (coupled channels, or activations such as hardswish); use "
                "fold='bias', or DistributedDataParallel"
            )

    # --- prepared once

    def _find_regime(self, empty: tuple[int, ...]) -> _Regime | None:
        """What follows when these layers (strongest first) are emptied and the others lose nothing;
        None where one of them is given a channel back.
        """
        strength = {self._names[row]: 1.0 / (2 + rank) for rank, row in enumerate(empty)}
        compared = {
            name: torch.full((size,), strength.get(name, 2.0))
            for name, size in zip(self._names, self._sizes, strict=True)
        }
        limits = dict.fromkeys(self._names, 1.0)
        choice, _, _ = select(
            self._channels, compared, limits, self._vanishing, lambda choice: Fold(), 1, 1
        )
        counts = [choice.count(name) for name in self._names]
        if any(counts[row] for row in empty):
            return None
        reading = self._reading(choice.alive())
        rows, answers = [], []
        for row, name in enumerate(self._names):
            answer = self._seen.answers(name, reading)
            if any(answer):
                rows.append(row)
                answers.append(answer)
        dropped = frozenset(row for row, count in enumerate(counts) if count == 0)
        positive = all(answer == POSITIVE for answer in answers)
        return _Regime(dropped, tuple(rows), tuple(answers), positive)

    # --- the way of `plan`

    def _by_selection(
        self, compared: Mapping[str, Tensor], limits: Mapping[str, float | None]
    ) -> float:
        choice, folded, _ = select(
            self._channels,
            compared,
            limits,
            self._vanishing,
            self._constants,
            self.round_to,
            self.min_channels,
        )
        alive = choice.alive() | self._channels.in_classes(folded.constant)
        return 1.0 - self._macs(alive) / self.macs_before

    def _macs(self, alive: Tensor) -> int:
        sizes = [(int(alive[c.inputs].sum()), int(alive[c.outputs].sum())) for c in self._counted]
        macs = sum(call.macs(*pair) for call, pair in zip(self._counted, sizes, strict=True))
        return macs + self._channels.graph.fixed_macs

    def _constants(self, choice: Selection) -> Fold:
        """What `fold_constants` would find, of which the constant channels are enough here."""
        reading = self._reading(choice.alive())
        constant = set()
        for name in self._seen.readers:
            labels = choice.layers[name]
            gone = ~choice.stays[labels]
            if not bool(gone.any()):
                continue
            answers = torch.tensor(self._seen.answers(name, reading), device="cpu")
            found = answers[ranges(self._beta_now[name].detach().cpu())[gone]]
            if self._shared or (bool((found == UNKNOWN).any()) and VISIBLE not in found):
                kept, alive = choice.kept(), choice.alive()
                return fold_constants(
                    self._model, self._channels, kept, alive, self._spec, self.fold
                )
            if VISIBLE in found:
                constant.add(int(labels[gone].min()))
        return Fold(constant=constant)

    def _reading(self, alive: Tensor) -> set[int]:
        calls = enumerate(self._channels.graph.projections)
        return {i for i, call in calls if not call.depthwise and bool(alive[call.outputs].any())}


def _bound(threshold: float | None) -> float:
    return -1.0 if threshold is None else threshold


def _plain(gamma: Tensor) -> bool:
    """Whether γ are compared as they are: not sharded, and not in more than single precision."""
    return gamma.dtype != torch.float64 and not hasattr(gamma, "full_tensor")
