"""How many of the weakest channels must go for a share to be cut, under all limits: `Aim`."""

from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError, PlanError
from ..folding.fold import new_biases
from ..folding.replay import Fold
from ..folding.visibility import Foretold
from ..scaling.factors import WORTH_SAYING
from .costs import NAMES, Costs, Latencies, check_of
from .selection import Chooser, Selection
from .thresholds import Ranking

#: Shares are compared up to this.
ROUNDING = 1e-12
#: How often the share is looked at on the way to all channels, where it may fall in between.
LOOKS = 48


def _more_layers(of: str, residual: str) -> str:
    """What else might help."""
    others = {"keep": "'expand' or 'couple'", "couple": "'expand'"}.get(residual, "'couple'")
    advice = f"try another residual mode in scaling_factors ({others}; it is '{residual}')"
    if of == "latency" and residual.startswith("expand"):
        advice += ": putting channels back takes time, which 'keep' and 'couple' do not"
    return advice


@dataclass(frozen=True)
class Reach:
    """Shares that can be cut: the smallest and the largest.

    Attributes:
        macs: of the multiply-accumulates.
        params: of the parameters.
        latency: of the time, where a latency table was given.
        residual: the mode that they hold for.
        pinned: as `ScalingFactors.pinned_macs`.
        binding: limit that binds, as given -> the largest shares without it, of MACs and of
            parameters, and of the time where that counts.
    """

    macs: tuple[float, float]
    params: tuple[float, float]
    binding: dict[str, tuple[float, ...]]
    pinned: dict[str, float] = field(default_factory=dict)
    latency: tuple[float, float] | None = None
    residual: str = "keep"

    def refusal(self, cut: float, of: str = "macs") -> PlanError:
        """Says that this share is out of reach, and what is not."""
        what = NAMES[of]
        costly = [item for item in self.pinned.items() if item[1] >= WORTH_SAYING][:2]
        return PlanError(
            f"cut={cut:g} of the {what} is out of reach: {self}. Ask for less, ease a limit, or "
            + _more_layers(of, self.residual)
            + "".join(f"; {share:.1%} of the MACs stay for: {why}" for why, share in costly)
        )

    def __str__(self) -> str:
        found = [self.macs, self.params] + ([] if self.latency is None else [self.latency])
        parts = [
            f"from {low:.1%} to {high:.1%} of the {what}"
            for (low, high), what in zip(found, NAMES.values(), strict=False)
        ]
        lines = [f"{', '.join(parts[:-1])} and {parts[-1]} can be cut"]
        for name, shares in self.binding.items():
            each = zip(shares, NAMES.values(), strict=False)
            most = ", ".join(f"{share:.1%} of the {what}" for share, what in each)
            lines.append(f"without {name}: {most} at most")
        if not self.binding:
            lines.append("no limit binds: every layer is then at its last channel")
        return "; ".join(lines)


@dataclass(eq=False)
class Hit:
    """What happens when some of the weakest channels go.

    Attributes:
        count: how many.
        choice, folded: the channels that stay, and the constants of those that go.
        shares: the shares cut, by what they are shares of.
    """

    count: int
    choice: Selection
    folded: Fold
    shares: dict[str, float]


@dataclass(frozen=True)
class Aim:
    """A share to cut.

    Attributes:
        cut: the share.
        of: what of ("macs", "params" or "latency").
        latency: the times.
    """

    cut: float
    of: str
    latency: Latencies | None = None

    @classmethod
    def given(
        cls,
        cut: float,
        of: str,
        method: str | None,
        value: float | None,
        latency: Latencies | None = None,
    ) -> "Aim":
        """From arguments as in `plan`.

        Raises:
            ArgumentError: they do not go together, or are out of their range.
        """
        if not isinstance(cut, int | float) or isinstance(cut, bool) or not 0 <= cut < 1:
            raise ArgumentError(f"cut={cut!r}: give the share to cut, in [0, 1)")
        check_of(of, latency)
        if value is not None:
            raise ArgumentError(
                f"value={value!r} and cut={cut!r}: a threshold is either given or follows from the "
                "share to cut; leave one of them out"
            )
        if method not in (None, "percentile", "valley"):
            raise ArgumentError(
                f"method={method!r} with cut={cut!r}: choose 'percentile' (one order of |γ| for "
                "all layers) or 'valley' (those under their layer's valley first)"
            )
        return cls(float(cut), of, latency)

    def hit(self, chooser: Chooser, ranking: Ranking) -> Hit:
        """Remove as few of the weakest channels as cut this share.

        Raises:
            PlanError: the share is out of reach.
        """
        return _Search(chooser, ranking, self).run()


def reach(chooser: Chooser, ranking: Ranking, latency: Latencies | None = None) -> Reach:
    """What can be cut at all, and which limits bind."""
    most = _Trials(chooser, ranking, latency).largest()
    binding = {}
    for name, value in chooser.limits.given.items():
        freer = chooser.under(chooser.limits.without(name))
        shares = _Trials(freer, ranking, latency).largest()
        if any(share > most[of] + ROUNDING for of, share in shares.items()):
            step = latency is not None and (name, value) == ("round_to", latency.step)
            whose = " (the latency table's step)" if step else ""
            binding[f"{name}={value}{whose}"] = tuple(shares.values())
    pinned = chooser.channels.pinned_macs
    times = (0.0, most["latency"]) if "latency" in most else None
    residual = chooser.channels.residual
    return Reach((0.0, most["macs"]), (0.0, most["params"]), binding, pinned, times, residual)


class _Trials:
    """What is cut when so many of the weakest channels go.

    Attributes:
        ranking: the order of the channels.
        most: what happens when all go that can. What stays then stays in every trial.
    """

    def __init__(
        self, chooser: Chooser, ranking: Ranking, latency: Latencies | None = None
    ) -> None:
        self._chooser, self.ranking = chooser, ranking
        self._costs = Costs(chooser.model, chooser.channels, latency)
        self._foretold: Foretold | None = None
        self._biases: list[Tensor] = []  # for each bias created in the last run, its classes
        self._before = self._weigh(~chooser.channels.graph.mask())
        # By count; holds while the created biases are the same.
        self._foreseen: dict[int, dict[str, float]] = {}
        self.most = self.really(ranking.count)

    def largest(self) -> dict[str, float]:
        """The largest shares that can be cut. Of the time that need not be when most goes: a layer
        of few channels may be slow.
        """
        found = dict(self.most.shares)
        if "latency" in found:
            times = [self.foreseen(count)["latency"] for count in self.looks()]
            found["latency"] = max(0.0, found["latency"], *times)
        return found

    def looks(self) -> list[int]:
        """Counts at even distances, the last of them all that can go."""
        return [self.ranking.count * look // LOOKS for look in range(1, LOOKS + 1)]

    def foreseen(self, count: int) -> dict[str, float]:
        """The shares cut, with constant channels as they are foretold."""
        if count not in self._foreseen:
            bounds = self.ranking.bounds(count)
            choice, folded = self._chooser.choose(self.ranking.places, bounds, self._constants)
            self._foreseen[count] = self._shares(choice, folded)
        return self._foreseen[count]

    def really(self, count: int) -> Hit:
        """The same from a run of the network."""
        choice, folded = self._chooser.choose(self.ranking.places, self.ranking.bounds(count))
        created = new_biases(self._chooser.model, self._chooser.channels, folded)
        biases = [created[name] for name in sorted(created)]
        if not (len(biases) == len(self._biases) and all(map(torch.equal, biases, self._biases))):
            self._biases = biases
            self._foreseen.clear()
        return Hit(count, choice, folded, self._shares(choice, folded))

    def _constants(self, choice: Selection) -> Fold:
        """What running the network is expected to find, of which the constant channels are enough
        here.
        """
        chooser = self._chooser
        if self._foretold is None:
            looks = [choice.only(places) for places in self.ranking.ends()]
            self._foretold = Foretold(
                chooser.model, chooser.channels, looks, chooser.inputs, chooser.fold
            )
        return Fold(constant=self._foretold.constants(choice.stays))

    def _shares(self, choice: Selection, folded: Fold) -> dict[str, float]:
        after = self._weigh(choice.staying(folded.constant))
        return {of: 1.0 - after[of] / (before or 1.0) for of, before in self._before.items()}

    def _weigh(self, stays: Tensor) -> dict[str, float]:
        return self._costs.all(stays, self._biases)


class _Search:
    """The search for the number of channels."""

    def __init__(self, chooser: Chooser, ranking: Ranking, aim: Aim) -> None:
        self._trials, self._aim = _Trials(chooser, ranking, aim.latency), aim
        self._chooser, self._most = chooser, ranking.count

    def run(self) -> Hit:
        if not self._reached(self._trials.largest()):
            raise self._out_of_reach()
        seen: dict[int, Hit] = {}
        while (count := self._crossing()) not in seen:
            expected = self._trials.foreseen(count)
            seen[count] = self._trials.really(count)
            if seen[count].shares == expected:
                return seen[count]
        return self._best(seen)

    def _best(self, seen: dict[int, Hit]) -> Hit:
        """Where constants cannot be foretold: the best of what was seen, or of what is seen when
        more go.
        """
        step, count = 1, max(seen)
        while not any(self._reached(hit.shares) for hit in seen.values()) and count < self._most:
            count, step = min(count + step, self._most), 2 * step
            seen[count] = self._trials.really(count)
        enough = [hit for hit in seen.values() if self._reached(hit.shares)]
        if not enough:
            raise self._out_of_reach()
        return min(enough, key=lambda hit: hit.shares[self._aim.of])

    def _reached(self, shares: dict[str, float]) -> bool:
        return shares[self._aim.of] >= self._aim.cut - ROUNDING

    def _out_of_reach(self) -> PlanError:
        found = reach(self._chooser, self._trials.ranking, self._aim.latency)
        return found.refusal(self._aim.cut, self._aim.of)

    def _crossing(self) -> int:
        """A count at which enough goes and with one channel less does not, as foretold."""
        first, last = 0, self._most
        if self._aim.of == "latency":  # one channel less may be slower: not the last crossing
            looks = self._trials.looks()
            last = next(n for n in looks if n == self._most or self._enough(n))
            first = last - self._most // LOOKS - 1
        counts = range(max(first, 0), last)
        return counts.start + bisect_left(counts, True, key=self._enough)

    def _enough(self, count: int) -> bool:
        """Whether the share is reached when so many go, as foretold."""
        return self._reached(self._trials.foreseen(count))
