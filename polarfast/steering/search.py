"""`search`: λ and t for a share of MACs, by whole trainings (Algorithm 1), and their journal."""

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from ..documents import brief, check_fields, parse_json, real, sealed, short, unsealed, whole
from ..errors import ArgumentError, FileFormatError, SearchError
from ..storage import MOST_TEXT, open_file, sync_folder

_log = logging.getLogger(__name__)

FORMAT, VERSION = "polarfast-search", 1  # of the journal
#: After so many trials in a row that cut too little, λ's bracket is taken to be too small,
RAISES = 4
#: and its upper end grows by this factor, at most so often.
GROWTH, GROWTHS = 4.0, 6
#: A search from a λ goes outward by this factor until the share lies between those of two λ.
OUTWARD = 4.0
#: A bracket is given up when it has shrunk to this share of its first width: F jumps within it.
NARROW = 1 / 64
#: Beyond these, all factors end on one side (Theorem 3.2).
T_RANGE = (-2.0, 2.0)


@dataclass(frozen=True)
class Trial:
    """One training of a search: what was asked, the share it cut, and how many epochs it took."""

    lam: float
    t: float
    cut: float
    epochs: int


_TRIAL = {
    "lam": real(0, sys.float_info.max),
    "t": real(-3, 3),
    "cut": real(0, 1),
    "epochs": whole(0, 2**53),
}


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        lam, t, cut: of the trial closest to the share asked for.
        trials: all trials, in order.
        converged: whether `cut` is within the tolerance.
    """

    lam: float
    t: float
    cut: float
    trials: tuple[Trial, ...]
    converged: bool


@dataclass(frozen=True)
class Stability:
    """When F is stable, so that a trial can end.

    Attributes:
        window, spread: the last `window` epochs' shares span at most `spread`.
        least: a trial has at least so many epochs.
        begun, patience: while all of the window is under `begun`, the γ are only starting to part:
            that is stable only after `patience` times `least` epochs.
    """

    window: int = 5
    spread: float = 0.01
    least: int = 10
    begun: float = 0.05
    patience: int = 3

    def reached(self, cuts: list[float]) -> bool:
        """Whether these shares, one an epoch, have become stable."""
        if len(cuts) < max(self.window, self.least):
            return False
        recent = cuts[-self.window :]
        if max(recent) < self.begun and len(cuts) < self.least * self.patience:
            return False
        return max(recent) - min(recent) <= self.spread


def search(
    train: Callable[[float, float], Iterable[float]],
    cut: float = 0.54,
    tol: float = 0.05,
    journal: str | Path | None = None,
    *,
    lam: float | None = None,
    lam_high: float | None = None,
    t: float = 1.2,
    t_step: float = 0.1,
    stability: Stability | None = None,
    max_trials: int = 20,
) -> SearchResult:
    """Find λ and t whose training cuts a share of the MACs (Algorithm 1 of the paper).

    First λ is bisected in [0, `lam_high`] until the share is within 2·`tol`, then t goes in steps
    of `t_step` until it is within `tol`. As printed, this can loop for ever. Here

    - the bracket of λ grows fourfold after four trials in a row that cut too little, and at each
      further one; where F does not answer to that, or jumps within the bracket, t takes over;
    - with `lam`, a λ that is thought to be about right (a recipe's, or `suggest_lam`), the search
      starts there and goes outward fourfold, out of regions where nothing is cut, until the share
      lies between those of two λ, then halves their ratio; a trial ends as soon as it cuts more
      than `cut` + 2·`tol`;
    - t is bisected once the share asked for lies between those of two t, and stays in [−2, 2];
    - there are `max_trials` trainings at most.

    Args:
        train: `train(lam, t)` starts a training and yields the share cut after each epoch. It is
            closed (`close()`, for a generator) when the share is stable; one that ends by itself
            counts with its last value. For trials from a common warm start, load it in there.
        cut: the share to cut, in (0, 1).
        tol: δ, how far from `cut` the result may be.
        journal: a file to which each finished trial is added. Started again with the same settings,
            the search goes on after the last of them.
        lam: where λ starts; without it, Algorithm 1 as printed decides.
        lam_high: where λ's bracket ends, in place of `lam`; 2e-4, the paper's, if neither is given.
        t, t_step: where t starts and how far it steps.
        stability: when a trial's share is stable.
        max_trials: the most trainings, those in the journal included.

    Returns:
        The trial closest to `cut`; `converged` says whether it is within `tol` (if not, it is
        within 2·`tol`).

    Raises:
        ArgumentError: an argument is no number or out of its range, or the journal is of other
            settings or in no folder.
        FileFormatError: the journal is damaged.
        SearchError: `train` yields nothing or what is no share of MACs; or the search ended without
            coming within 2·`tol`. The message lists all trials.
    """
    if lam is not None and lam_high is not None:
        raise ArgumentError(
            f"lam={lam!r} and lam_high={lam_high!r}: start from one λ, or bisect up to one; leave "
            "one of them out"
        )
    if lam is None and lam_high is None:
        lam_high = 2e-4
    start = {"lam_high": lam_high} if lam is None else {"lam": lam}
    numbers = {"cut": cut, "tol": tol, **start, "t": t, "t_step": t_step}
    _check(numbers, max_trials)
    stability = stability or Stability()
    settings = {**numbers, "stability": dataclasses.asdict(stability)}
    run = _Search(train, cut, tol, Journal(journal, settings), stability, max_trials)
    try:
        if lam is not None:
            run.find_lam_from(lam, t)
        elif lam_high is not None:
            run.find_lam(lam_high, t)
        run.find_t(t_step)
        ending = ""
    except _Over as over:
        ending = str(over)
    best = run.best()
    if run.off(best) < tol:
        ending = ""
    elif run.off(best) >= 2 * tol:
        raise SearchError(f"no λ and t found that cut {cut:g} ± {tol:g}: {ending}.\n{run.table()}")
    if ending:
        _log.warning("search ended without converging: %s", ending)
    return SearchResult(best.lam, best.t, best.cut, tuple(run.trials), not ending)


def _check(numbers: dict[str, Any], max_trials: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise ArgumentError(f"{name}={number!r}: it must be an int or a float")
    cut, tol, strength, t, t_step = numbers.values()
    if not 0.0 < cut < 1.0:
        raise ArgumentError(f"cut={cut!r}: give the share of MACs to cut, between 0 and 1")
    if not 0.0 < tol < 1.0:
        raise ArgumentError(f"tol={tol!r}: give how far from cut= a result may be, e.g. 0.05")
    for name, number in ((list(numbers)[2], strength), ("t_step", t_step)):
        if not 0.0 < number < math.inf:
            raise ArgumentError(f"{name}={number!r}: give a finite number above 0")
    if not T_RANGE[0] <= t <= T_RANGE[1]:
        raise ArgumentError(f"t={t!r}: start from a t between -2 and 2 (Theorem 3.2)")
    if not isinstance(max_trials, int) or max_trials < 1:
        raise ArgumentError(f"max_trials={max_trials!r}: give a whole number, at least 1")


class Journal:
    """A file of JSON lines: a header with the settings, then one line for each entry.

    A process killed while it writes leaves a torn last line, which the next one drops.

    Args:
        path: the file; made if it is not there. None: nothing is written.
        settings: what entries depend on.

    Attributes:
        entries: those that were in the file.

    Raises:
        ArgumentError: the file was written with other settings, which the message names; or it
            cannot be a file there.
        FileFormatError: the file is no journal, or is damaged before its last line.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.entries: list[dict[str, Any]] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ArgumentError(
                f"journal={str(path)!r}: there is no folder {str(self.path.parent)!r}; make it "
                "first, or name another file"
            )
        if self.path.is_dir():
            raise ArgumentError(f"journal={str(path)!r} is a folder: name a file in it")
        header = {"format": FORMAT, "version": VERSION, "settings": settings}
        lines = self._whole_lines(self.path) if self.path.exists() else []
        if lines:
            self._check(lines[0], settings)
            self.entries = lines[1:]
        if self.path.exists():
            self._drop_torn_line(self.path)
        if not lines:
            self._write(header)

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry; it is on disk when this returns."""
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(json.dumps(sealed(entry)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self.path.parent)

    def _whole_lines(self, path: Path) -> list[dict[str, Any]]:
        """The entries in the file, which is left as it is: it may be somebody else's."""
        with open_file(path, "name another file") as file:
            content = file.read(MOST_TEXT)
        end = content.rfind(b"\n") + 1
        beginning = f'{{"format": "{FORMAT}"'.encode()
        if content[: len(beginning)] != beginning[: len(content)]:
            raise self._foreign()
        lines = []
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                entry = parse_json(line.decode("utf-8"))
                if not isinstance(entry, dict):
                    raise ValueError("it is no mapping")
                lines.append(unsealed(entry))
            except ValueError as error:
                raise FileFormatError(
                    f"'{path}', line {number} is no entry of a journal: {error}; delete the file, "
                    "or this line and all after it"
                ) from error
        return lines

    def _drop_torn_line(self, path: Path) -> None:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            _log.warning("%s: the last line was not written to its end and is dropped", path)
            os.truncate(path, end)

    def _foreign(self) -> FileFormatError:
        return FileFormatError(
            f"{self.path} is not a search journal that this polarfast reads: name another file"
        )

    def _check(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        old = header.get("settings")
        if header.get("version") != VERSION or not isinstance(old, dict):
            raise self._foreign()
        names = [n for n in {**old, **settings} if old.get(n) != settings.get(n)]
        if names:
            differing = ", ".join(
                f"{brief(n)} ({short(old.get(n))}, now {short(settings.get(n))})" for n in names[:3]
            )
            raise ArgumentError(
                f"journal={str(self.path)!r} is of a search with other settings: {differing}; "
                "name another file, or delete it"
            )


class _Over(Exception):
    """The search cannot go on; why."""


class _Search:
    """The trials of one search, and the two loops of Algorithm 1."""

    def __init__(
        self,
        train: Callable[[float, float], Iterable[float]],
        cut: float,
        tol: float,
        journal: Journal,
        stability: Stability,
        max_trials: int,
    ) -> None:
        self._train, self._cut, self._tol = train, cut, tol
        self._journal, self._stability, self._max_trials = journal, stability, max_trials
        self._most = math.inf  # a trial that cuts more has shown what it can
        self.trials: list[Trial] = []

    def off(self, trial: Trial) -> float:
        """|F − F*|."""
        return abs(trial.cut - self._cut)

    def best(self) -> Trial:
        """The trial closest to the share asked for."""
        return min(self.trials, key=self.off)

    def table(self) -> str:
        """All trials, one a line."""
        return "\n".join(
            f"  λ={trial.lam:.4g} t={trial.t:.4g}: {trial.cut:.4f} cut after {trial.epochs} epochs"
            for trial in self.trials
        )

    def find_lam(self, high: float, t: float) -> None:
        """The first loop: bisect λ until F is within 2δ."""
        low, width, raises, growths, before = 0.0, high, 0, 0, -1.0
        bounded = False  # whether `high` is known to cut too much
        while True:
            trial = self._run((low + high) / 2, t)
            excess = trial.cut - self._cut
            if abs(excess) < 2 * self._tol:
                return
            if excess > 0:
                high, bounded, raises = trial.lam, True, 0
            else:
                low, raises = trial.lam, raises + 1
            if not bounded and raises >= RAISES:
                if growths == GROWTHS or (growths and trial.cut < before + self._tol / 10):
                    return  # λ moves F no more
                high, growths, before = high * GROWTH, growths + 1, trial.cut
                width = high
            if high - low < width * NARROW:
                return

    def find_lam_from(self, lam: float, t: float) -> None:
        """The first loop from a λ outward, then between two, until F is within 2δ."""
        self._most = self._cut + 2 * self._tol
        low = high = math.nan  # the last λ that cut too little, and too much
        before, same = math.nan, 0  # how often in a row F did not answer to λ
        while True:
            trial = self._run(lam, t)
            excess = trial.cut - self._cut
            if abs(excess) < 2 * self._tol:
                break
            answers = math.isnan(before) or abs(trial.cut - before) > self._tol / 10
            same, before = 0 if answers else same + 1, trial.cut
            low, high = (low, lam) if excess > 0 else (lam, high)
            if not math.isnan(low) and not math.isnan(high):
                if high / low < 1 + NARROW:
                    break
                lam = math.sqrt(low * high)
            elif same == GROWTHS:
                break  # λ moves F no more
            else:
                lam = lam / OUTWARD if excess > 0 else lam * OUTWARD
        self._most = math.inf

    def find_t(self, step: float) -> None:
        """The second loop: move t until F is within δ, from the trial that came closest."""
        trial = self.best()
        low = high = math.nan  # the last t that cut too little, and too much
        while self.off(trial) >= self._tol:
            if trial.cut > self._cut:
                high, other, t = trial.t, low, trial.t - step
                passes = t <= low < high
            else:
                low, other, t = trial.t, high, trial.t + step
                passes = low < high <= t
            if passes:
                if abs(other - trial.t) < step * NARROW:
                    raise _Over(f"F jumps over it between t={low:.6g} and t={high:.6g}")
                t = (trial.t + other) / 2
            if not T_RANGE[0] - 1e-9 <= t <= T_RANGE[1] + 1e-9:
                side = "more" if trial.cut < self._cut else "less"
                raise _Over(f"t={trial.t:.4g} is at its limit, and {side} would have to be cut")
            trial = self._run(trial.lam, t)

    def _run(self, lam: float, t: float) -> Trial:
        """A trial: from the journal, or by training."""
        if len(self.trials) == self._max_trials:
            raise _Over(f"max_trials={self._max_trials} trainings are done")
        recorded = self._journal.entries[len(self.trials) :]
        if recorded:
            trial = self._read(recorded[0], lam, t)
        else:
            trial = self._measure(lam, t)
            self._journal.add(dataclasses.asdict(trial))
        self.trials.append(trial)
        return trial

    def _read(self, entry: dict[str, object], lam: float, t: float) -> Trial:
        names = [field.name for field in dataclasses.fields(Trial)]
        try:
            check_fields(entry, _TRIAL, f"trial {len(self.trials) + 1}")
        except ValueError as error:
            raise FileFormatError(
                f"'{self._journal.path}' holds what is not a trial ({error}); delete the file"
            ) from error
        numbers = [entry[name] for name in names]
        if (entry["lam"], entry["t"]) != (lam, t):
            raise ArgumentError(
                f"journal={str(self._journal.path)!r}: trial {len(self.trials) + 1} is of "
                f"λ={entry['lam']}, t={entry['t']}, but this search comes to λ={lam}, t={t}: name "
                "another file, or delete it"
            )
        return Trial(*numbers)  # type: ignore[arg-type]

    def _measure(self, lam: float, t: float) -> Trial:
        cuts: list[float] = []
        training = self._train(lam, t)
        try:
            for share in training:
                cuts.append(self._share(share, lam, t))
                if self._stability.reached(cuts) or cuts[-1] > self._most:
                    break
        finally:
            close = getattr(training, "close", None)
            if close is not None:
                close()
        if not cuts:
            raise SearchError(
                f"train(lam={lam}, t={t}) yielded nothing: yield the share cut after each epoch"
            )
        return Trial(lam, t, cuts[-1], len(cuts))

    def _share(self, share: object, lam: float, t: float) -> float:
        number = _number(share)
        if -1e-6 <= number <= 1:
            return number
        done = f"\nTrials before:\n{self.table()}" if self.trials else ""
        raise SearchError(
            f"train(lam={lam}, t={t}) yielded {share!r}: yield the share of MACs cut, from 0 to 1 "
            f"(CutPredictor.cut()){done}"
        )


def _number(value: object) -> float:
    """Of a number of any kind, a tensor or array with one element too; NaN: it is none."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError):  # of several elements; torch's and numpy's
        return math.nan
