"""One stage of a run, from its first step or a checkpoint to its end: :class:`StageLoop`."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import polarfast as pf

from ..errors import RunError
from ..sharding import whole
from .histograms import Gammas
from .interrupts import StopSignals
from .shrinking import Shrinking
from .trainer import Trainer
from .watching import Epoch, Observer, Step

AGREE_EVERY = 8  # steps between agreements of several processes on whether to save or stop
SHOW_SECONDS = 0.3  # between two reports of steps
_SAVE, _STOP, _DIVERGED = 1, 2, 3


class StageLoop:
    """Carries a trainer to the end of its stage.

    Args:
        name: of the stage, for people.
        observers: told of steps and epochs; on the first process only.
        history: receives a dict for each epoch; gammas: receives counts of γ [L, 100].
        save: writes a checkpoint; told whether this is the stage's best epoch so far.
        signals: that may ask to stop.
        scales, predict: all γ that may be pruned, and what pruning them now would cut.
        shrinking: makes the network smaller after an epoch; `scales` and `predict` are of the first
            one then, too.
        computed: share of the dense network's MACs that an image takes.

    Attributes:
        last: γ after the last epoch so far, at the end of the stage in any case.
    """

    def __init__(
        self,
        trainer: Trainer,
        name: str,
        observers: Sequence[Observer],
        history: list[dict[str, Any]],
        gammas: list[Tensor],
        save: Callable[[bool], None],
        signals: StopSignals,
        scales: pf.ScalingFactors | None = None,
        predict: pf.CutPredictor | None = None,
        shrinking: Shrinking | None = None,
        computed: float = 1.0,
    ) -> None:
        self.trainer, self.name, self.observers = trainer, name, observers
        self.history, self.gammas, self._save, self._signals = history, gammas, save, signals
        self.scales, self.predict, self.shrinking = scales, predict, shrinking
        self._computed = computed
        if scales is not None and predict is not None:
            predict.rebind(scales)
        self.last: Gammas | None = None
        self._minutes = trainer.recipe.hardware.checkpoint_minutes
        self._saved = self._shown = time.perf_counter()
        self._steps_shown = trainer.step

    def epochs(self) -> Iterator[None]:
        """Train to the end of the stage; yields after each epoch, its checkpoint written.

        Raises:
            Interrupted: a signal asked to stop; the checkpoint is written.
            RunError: the loss or a weight is no longer finite; no checkpoint holds that.
        """
        trainer, epochs = self.trainer, self.trainer.stage.epochs
        for observer in self.observers:
            observer.stage_started(self.name, trainer.step, trainer.steps, epochs)
        while trainer.epoch < epochs:
            start, first = time.perf_counter(), trainer.step
            for _ in trainer.rest_of_epoch():
                if self.observers:
                    self._show()
                self._pause()
            self._epoch_done(time.perf_counter() - start, trainer.step - first)
            # Now the checkpoint is there, so stopping costs nothing.
            if trainer.workers.agree(bool(self._signals.received)):
                raise self._signals.interruption()
            yield
        if self.last is None:  # interrupted after the last epoch
            self.last = self._gammas()

    def _pause(self) -> None:
        """Between two steps of an epoch: save or stop, where it is time or was asked for."""
        trainer, workers = self.trainer, self.trainer.workers
        if trainer.step % trainer.steps_per_epoch == 0:
            return  # the epoch's own checkpoint comes next
        # Also where the step runs on a GPU, which to ask for its loss would hold up.
        if (workers.world > 1 or trainer.loss.is_cuda) and trainer.step % AGREE_EVERY:
            return
        due = time.perf_counter() - self._saved >= 60 * self._minutes
        wanted = _STOP if self._signals.received else _SAVE * (due and workers.first)
        wanted = workers.agree(_DIVERGED if trainer.diverged() else wanted)
        if wanted == _DIVERGED:
            raise self._divergence()
        if wanted:
            self._check_finite()
            self._checkpoint(False)
        if wanted == _STOP:
            raise self._signals.interruption()

    def _checkpoint(self, best: bool) -> None:
        self._save(best)
        self._saved = time.perf_counter()

    def _check_finite(self) -> None:
        found = self.trainer.workers.gather((self.trainer.broken(), self.trainer.diverged()))
        broken = next((name for name, _ in found if name is not None), None)
        if broken is not None or any(diverged for _, diverged in found):
            raise self._divergence(broken)

    def _divergence(self, broken: str | None = None) -> RunError:
        trainer = self.trainer
        done = (trainer.step - 1) % trainer.steps_per_epoch + 1
        what = f"'{broken}' is no longer finite" if broken else "the loss is no longer finite"
        if broken is None and trainer.scaler.is_enabled():
            what = "float16 gradients overflow at every step"
        return RunError(
            f"{self.name} diverged: {what} after step {trainer.step:,} of {trainer.steps:,} (epoch "
            f"{(trainer.step - 1) // trainer.steps_per_epoch + 1}, batch {done} of "
            f"{trainer.steps_per_epoch}), at a learning rate of {trainer.lr:g}"
        )

    def _epoch_done(self, seconds: float, steps: int) -> None:
        self._check_finite()
        trainer = self.trainer
        accuracy = trainer.accuracy()
        with trainer.averaged():  # what would be pruned
            self.last = self._gammas()
        earlier = [past["accuracy"] for past in self.history if past["stage"] == self.name]
        epoch = Epoch(
            stage=self.name,
            epoch=trainer.epoch,
            epochs=trainer.stage.epochs,
            index=len(self.history) + 1,
            loss=trainer.mean_loss(),
            accuracy=accuracy,
            lr=trainer.lr,
            seconds=seconds,
            images_per_second=steps * trainer.recipe.batch_size / seconds,
            gammas=self.last,
            computed=self.shrinking.left if self.shrinking else self._computed,
        )
        self.history.append(epoch.to_dict())
        if self.last is not None:
            self.gammas.append(self.last.histograms)
        if self.shrinking is not None and trainer.epoch < trainer.stage.epochs:
            self.shrinking.after_epoch(trainer)
        self._checkpoint(accuracy > max(earlier, default=-1.0))
        for observer in self.observers:
            observer.epoch_finished(epoch)

    def _show(self) -> None:
        now, trainer = time.perf_counter(), self.trainer
        if now - self._shown < SHOW_SECONDS:
            return
        # Sharded γ could be looked at by all processes together only: at the end of the epoch.
        sharded = trainer.recipe.hardware.parallel == "fsdp"
        gammas = None if sharded or trainer.broken() else self._gammas()
        rate = (trainer.step - self._steps_shown) * trainer.recipe.batch_size / (now - self._shown)
        self._shown, self._steps_shown = now, trainer.step
        done = (trainer.step - 1) % trainer.steps_per_epoch + 1
        step = Step(
            stage=self.name,
            step=trainer.step,
            steps=trainer.steps,
            epoch=(trainer.step - 1) // trainer.steps_per_epoch + 1,
            epochs=trainer.stage.epochs,
            loss=float(trainer.loss) / done,
            lr=trainer.lr,
            images_per_second=rate,
            cut=None if gammas is None else gammas.cut,
            at_zero=None if gammas is None else gammas.at_zero,
        )
        for observer in self.observers:
            observer.step_finished(step)

    def _gammas(self) -> Gammas | None:
        if self.scales is None or self.predict is None:
            return None
        if self.shrinking is not None:
            self.shrinking.keep_up()
        with torch.no_grad():
            values = {  # copies: the parameters go on changing
                name: gamma.to("cpu", torch.float32, copy=True).flatten()
                for name, gamma in whole(self.scales).items()
            }
        regularizer = self.trainer.regularizer
        return Gammas(
            values=values,
            cut=self.predict.cut({name: gamma.abs() for name, gamma in values.items()}),
            lam=regularizer.lam if regularizer else 0.0,
            t=regularizer.t if regularizer else 0.0,
        )
