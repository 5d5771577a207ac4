"""A recipe carried out in a folder, resumable at any moment: train, prune, fine-tune."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import polarfast as pf

from ..errors import RunError
from . import distributed
from .data.source import DataSource, load
from .distributed import Workers, deterministic
from .folder import FORMAT, Artifacts, Checkpoints
from .interrupts import StopSignals
from .networks import Networks
from .recipe import PHASES, Recipe, Stage
from .seeds import seed_at
from .shrinking import Shrinking
from .stages import StageLoop
from .trainer import Trainer, evaluate, steps_per_epoch
from .watching import Observer

DONE = "done"


class Run:
    """Carries out a recipe; its checkpoints say how far it is.

    Every process of the run makes one of these; the first one writes and speaks.

    Args:
        recipe: what to do. folder: where everything is written; made when the run is executed.
        state: a checkpoint to go on from; None starts anew. data: loaded already.

    Attributes:
        phase: the phase that goes on or comes next, or ``DONE``.
        steps_per_epoch: optimizer steps.
        history: one dict of numbers for each finished epoch.
        gammas: counts of γ by epoch, layer and bin; facts: what became known on the way.
        networks: the networks, as they were or are now.
        observers: told of every stage, step and epoch.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        workers: Workers,
        state: dict[str, Any] | None = None,
        data: DataSource | None = None,
    ) -> None:
        self.recipe, self.workers = recipe, workers
        self.files = Artifacts(folder)
        self.checkpoints = Checkpoints(folder, recipe.hardware.keep)
        self.observers: Sequence[Observer] = ()
        state = state or {}
        before = recipe.pruning.method == "uniform"  # a narrower network, trained from scratch
        self.phases = ("prune", "train", "finetune") if before else PHASES
        self.phase: str = state.get("phase", self.phases[0])
        self.history: list[dict[str, Any]] = list(state.get("history", []))
        self.gammas: list[torch.Tensor] = list(state.get("gammas", []))
        self.facts: dict[str, float] = dict(state.get("facts", {"seconds": 0.0}))
        self._trainer_state: dict[str, Any] | None = state.get("trainer")
        self._shrunk: dict[str, Any] | None = state.get("shrunk")
        self._shrinking: Shrinking | None = None
        self._clock = time.perf_counter()
        self._signals = StopSignals()
        self.data = data or load(recipe.data, workers.device)
        self.networks = Networks(recipe, self.data, self.files, workers.device)
        # What does not fit is refused before anything is written.
        self.steps_per_epoch = steps_per_epoch(self.data, recipe, workers)
        step = self._trainer_state["step"] if self._trainer_state else 0
        workers.check_same((self.phase, step, len(self.history)), f"checkpoint in '{folder}'")

    def execute(self, until: str = "finetune") -> None:
        """Do what is left of the run, up to and with a phase.

        Raises:
            Interrupted: a signal asked to stop; the checkpoint is written.
        """
        self._clock = time.perf_counter()
        work = {"train": self._train, "prune": self._prune, "finetune": self._finetune}
        last = self.phases.index(until)
        if self.workers.first:
            self.files.prepare()
        with deterministic(self.recipe.hardware.deterministic), self._signals:
            while self.phase != DONE and self.phases.index(self.phase) <= last:
                work[self.phase]()
                if self.workers.agree(self._signals.received):
                    raise self._signals.interruption()

    def _train(self) -> None:
        if self.phases[0] == "prune":
            self._train_slim(self.recipe.train, "training", "pruned", "accuracy_pruned")
        else:
            for _ in self.training():
                pass

    def trial(self) -> Iterator[float]:
        """``training``, for a caller who looks at each epoch's share and may leave off early."""
        self._clock = time.perf_counter()
        self.files.folder.mkdir(parents=True, exist_ok=True)
        with deterministic(self.recipe.hardware.deterministic), self._signals:
            yield from self.training()

    def training(self) -> Iterator[float]:
        """The training of the dense network; yields, after each epoch, the share of the MACs that
        pruning would then cut. Epochs that were done before an interruption are yielded too.
        """
        yield from [past["cut"] for past in self.history if "cut" in past]
        if self.phase != "train":
            return
        model, scales = self.networks.fresh()
        sparsity = self.recipe.sparsity
        if self.recipe.weights and sparsity.init is not None and self._trainer_state is None:
            self._note(
                f"sparsity.init={sparsity.init:g} overwrites the scaling factors of "
                f"'{self.recipe.weights}'; to keep them: --sparsity.init None"
            )
        if self._trainer_state is None:
            self.networks.check_reach(model, scales)
        predict = self.networks.predictor(model, scales)
        steps = self.steps_per_epoch * self.recipe.train.epochs
        regularizer = self.networks.regularizer(model, scales, steps)
        self._shrinking = self._shrinks(model, scales, regularizer)
        model = distributed.prepare(model, self.recipe, self.workers)
        scales = scales.rebind(model)
        chosen = scales.select(sparsity.regularize) if sparsity.regularize else scales
        if self._shrinking is not None and self._shrunk is not None:
            small = self._shrinking.load_state_dict(self._shrunk)
            model = distributed.prepare(small, self.recipe, self.workers)
            chosen = self._shrinking.factors()
        trainer = self._trainer(model, self.recipe.train, chosen, regularizer)
        name = "sparsity training" if regularizer else "training"
        for _ in self._stage(trainer, name, scales, predict, self._shrinking):
            yield self.history[-1]["cut"]
        self.facts["accuracy_dense"] = trainer.accuracy()
        weights = self._result(trainer)
        self._shrinking = None
        if self.workers.first:
            self.files.write("dense", weights)
        self._next_phase()

    def _shrinks(
        self, model: nn.Module, scales: pf.ScalingFactors, regularizer: pf.Regularizer | None
    ) -> Shrinking | None:
        """What makes the network smaller while it trains, where the recipe wants it and it can."""
        sparsity = self.recipe.sparsity
        if not isinstance(regularizer, pf.FlopsTarget) or not sparsity.shrink:
            return None
        for why, there in (
            ("its gates are multiplied into it when it is made slim", sparsity.gates),
            ("FSDP2 shards it", self.recipe.hardware.parallel == "fsdp"),
        ):
            if there:
                self._note(f"The network is not made smaller while it trains: {why}")
                return None
        return Shrinking(self.networks, model, scales, regularizer, self._note)

    def _finetune(self) -> None:
        self._train_slim(self.recipe.finetune, "fine-tuning", "slim", "accuracy_finetuned")

    def _train_slim(self, stage: Stage, name: str, result: str, fact: str) -> None:
        """A stage of the slim network, which ends in the file ``result``."""
        model = distributed.prepare(self.networks.slim("pruned"), self.recipe, self.workers)
        teacher = self._teacher() if stage.distill else None
        trainer = self._trainer(model, stage, teacher=teacher)
        plan = self.files.plan()
        for _ in self._stage(trainer, name, computed=plan.macs / plan.macs_before):
            pass
        self.facts[fact] = trainer.accuracy()
        weights = self._result(trainer)
        if self.workers.first:
            slim = self.networks.slim("pruned")
            slim.load_state_dict(weights)
            self.files.write_slim(result, slim, plan)
        self._next_phase()

    def _teacher(self) -> nn.Module:
        """The network before pruning, for fine-tuning to follow."""
        model = self.networks.plain_dense().requires_grad_(False)
        if self.recipe.hardware.channels_last:
            model.to(memory_format=torch.channels_last)
        return model.eval()

    def _result(self, trainer: Trainer) -> dict[str, Any]:
        """The weights that a stage results in; every process must ask."""
        with trainer.averaged():
            model = trainer.model if self._shrinking is None else self._shrinking.write_back()
            state = distributed.model_state(model, self.recipe)
            return {name: tensor.clone() for name, tensor in state.items()}

    def _prune(self) -> None:
        """The first process plans and verifies; the others read what it wrote."""
        if self.workers.first:
            self._cut(
                self.networks.fresh()[0] if self.phases[0] == "prune" else self.networks.dense()
            )
        self.workers.wait()
        self._next_phase()

    def _cut(self, model: nn.Module) -> None:
        model.eval()
        scales = self.networks.scales(model)
        plan = self.networks.plan(model, scales)
        slim = pf.slim(model, plan, verify=True)
        report = pf.verify(model, slim, plan, self.data.example(64))
        self.facts["verified_error"] = float(report.rel_error)
        self.facts["cut"] = plan.flops_reduction
        self.files.write_plan(plan)
        self.files.write_slim("pruned", slim, plan)
        if self.phases[0] == "prune":
            return
        alone, precision = self.workers.alone(), self.recipe.precision
        self.facts["accuracy_pruned"] = evaluate(slim, self.data, alone, precision)
        dropped = pf.slim(model, plan, fold="none")
        without_beta = evaluate(dropped, self.data, alone, precision)
        self._note(
            f"Pruned: {100 * plan.flops_reduction:.1f} % of the MACs cut; accuracy "
            f"{self.facts['accuracy_dense']:.2f} % before, {self.facts['accuracy_pruned']:.2f} % "
            f"right after ({without_beta:.2f} % had the removed channels' β been dropped)"
        )

    def _trainer(
        self,
        model: nn.Module,
        stage: Stage,
        scales: pf.ScalingFactors | None = None,
        regularizer: pf.Regularizer | None = None,
        teacher: nn.Module | None = None,
    ) -> Trainer:
        seed = seed_at(self.recipe.seed, PHASES.index(self.phase))
        if regularizer is None:
            scales = None
        trainer = Trainer(
            model, self.data, self.recipe, stage, seed, self.workers, scales, regularizer, teacher
        )
        if self._trainer_state is not None:
            trainer.load_state_dict(self._trainer_state)
            self._trainer_state = None
        return trainer

    def _stage(
        self,
        trainer: Trainer,
        name: str,
        scales: pf.ScalingFactors | None = None,
        predict: pf.CutPredictor | None = None,
        shrinking: Shrinking | None = None,
        computed: float = 1.0,
    ) -> Iterator[None]:
        def save(best: bool) -> None:
            # First, so that it is there whenever the checkpoint says that the epoch is done.
            if self.workers.first and loop.last is not None:
                self.files.write_gammas(self.gammas, loop.last.values)
            self._save(trainer, self.phase if best else None)

        loop = StageLoop(
            trainer,
            name,
            self.observers,
            self.history,
            self.gammas,
            save,
            self._signals,
            scales,
            predict,
            shrinking,
            computed,
        )
        try:
            yield from loop.epochs()
        except RunError as error:
            raise RunError(f"{error}. {self._after_divergence()}") from None

    def _after_divergence(self) -> str:
        """What is left, and what to try."""
        good = self.checkpoints.numbered()
        left = f"The last good checkpoint is '{good[-1]}'" if good else "There is no checkpoint yet"
        stage = "finetune" if self.phase == "finetune" else "train"
        fp16 = ", or --precision bf16" if self.recipe.precision == "fp16" else ""
        return (
            f"{left}. The same settings would end here again: start anew, in another folder "
            f"(--out), with a smaller --{stage}.lr, a longer --{stage}.warmup, or --clip 1{fp16}"
        )

    def _next_phase(self) -> None:
        following = (*self.phases, DONE)
        self.phase = following[following.index(self.phase) + 1]
        if self.phase == "prune" and self.workers.first:
            self.files.write("trained", {"format": FORMAT, **self._state(None)})
        self._save(None)

    def _save(self, trainer: Trainer | None, best: str | None = None) -> None:
        """Every process must call this, at the same step; the first one writes."""
        now = time.perf_counter()
        self.facts["seconds"] += now - self._clock
        self._clock = now
        state = self._state(trainer)
        if self.workers.first:
            self.checkpoints.save(state, best)
        self.workers.wait()

    def _state(self, trainer: Trainer | None) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "phase": self.phase,
            "trainer": None if trainer is None else trainer.state_dict(),
            "shrunk": self._shrinking.state_dict() if self._shrinking else None,
            "history": self.history,
            "gammas": self.gammas,
            "facts": self.facts,
        }

    def _note(self, text: str) -> None:
        for observer in self.observers:
            observer.note(text)
