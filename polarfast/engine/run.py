"""A recipe carried out in a folder, resumable: sparsity training, pruning, fine-tuning."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import polarfast as pf
from polarfast.engine import data as data_sets
from polarfast.engine import models
from polarfast.engine.checkpoint import load_checkpoint, save_checkpoint, write_text
from polarfast.engine.events import Epoch, Gammas, Observer
from polarfast.engine.recipe import Recipe, Stage, differing_settings
from polarfast.engine.training import Trainer, evaluate, learning_rate
from polarfast.errors import ArgumentError
from polarfast.storage import write_atomically

CHECKPOINT, PLAN, RESULTS = "checkpoint.pt", "plan.json", "results.json"
DENSE, PRUNED, SLIM = "dense.pt", "pruned.pt", "slim.pt"
TRAIN, FINETUNE, DONE = "sparsity training", "fine-tuning", "done"


class Run:
    """Carries out a recipe; a checkpoint after every epoch says how far it is.

    Args:
        recipe: what to do.
        folder: where everything is written; made if it is not there.
        device: where the data and the models live.
        state: a checkpoint to go on from (:func:`find_checkpoint`); None starts anew.

    Attributes:
        history: one dict of numbers for each finished epoch.
        histograms: counts of γ in 100 bins, for each epoch of sparsity training.
        facts: what became known on the way: accuracies, verified error, seconds.
        observers: told of every stage and epoch.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.observers: Sequence[Observer] = ()
        state = state or {}
        self.stage: str = state.get("stage", TRAIN)
        self.history: list[dict[str, Any]] = list(state.get("history", []))
        self.histograms: list[torch.Tensor] = list(state.get("histograms", []))
        self.facts: dict[str, float] = dict(state.get("facts", {"seconds": 0.0}))
        self._trainer_state: dict[str, Any] | None = state.get("trainer")
        self._clock = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        self.data = data_sets.load(recipe.data, device, recipe.test_seed)

    def execute(self) -> None:
        """Do what is left of the run."""
        self._clock = time.perf_counter()
        if self.stage == TRAIN:
            self._sparsity_training()
        if self.stage == FINETUNE:
            self._finetuning()

    def build(self) -> nn.Module:
        """The dense network, with freshly drawn weights."""
        return models.build(self.recipe.model, self.data.classes, self.data.image_shape[0])

    def dense(self) -> nn.Module:
        """The dense network as it is after sparsity training."""
        model = self.build().to(self.device)
        weights = torch.load(self.folder / DENSE, map_location=self.device, weights_only=True)
        model.load_state_dict(weights)
        return model

    def slim(self, name: str = SLIM) -> nn.Module:
        """The slim network: fine-tuned, or as it was right after pruning (``PRUNED``)."""
        return pf.load(self.folder / name, build=self.build).to(self.device)

    def plan(self) -> pf.PruningPlan:
        """Which channels stay."""
        return pf.PruningPlan.from_json((self.folder / PLAN).read_text(encoding="utf-8"))

    def scales(self, model: nn.Module) -> pf.ScalingFactors:
        """The scaling factors that take part, of the dense network."""
        return pf.scaling_factors(model, self.example, residual=self.recipe.sparsity.residual)

    @property
    def example(self) -> torch.Tensor:
        """One test image, to trace with and to count the MACs of."""
        return self.data.test.images[:1]

    def _sparsity_training(self) -> None:
        sparsity = self.recipe.sparsity
        torch.manual_seed(self.recipe.seed)
        model = self.build().to(self.device)
        scales = self.scales(model)
        pf.init_scales(scales, sparsity.init)
        regularizer = pf.Polarization(lam=sparsity.lam, t=sparsity.t, upper=sparsity.upper)
        trainer = self._trainer(model, self.recipe.train, scales, regularizer)
        self._run_stage(trainer)
        self._prune(model, scales)

    def _finetuning(self) -> None:
        model = self.slim(PRUNED)
        self._run_stage(self._trainer(model, self.recipe.finetune))
        plan = self.plan()
        write_atomically(self.folder / SLIM, lambda file: pf.save(model, plan, file))
        self.facts["accuracy_finetuned"] = evaluate(model, self.data.test)
        self.stage = DONE
        self._save(None)

    def _prune(self, model: nn.Module, scales: pf.ScalingFactors) -> None:
        self.facts["accuracy_dense"] = evaluate(model, self.data.test)
        write_atomically(self.folder / DENSE, lambda file: torch.save(model.state_dict(), file))
        model.eval()
        plan = pf.plan(model, self.example, scales, method="valley")
        slim = pf.slim(model, plan, fold="exact", verify=True)
        report = pf.verify(model, slim, plan, self.data.test.images[:64])
        self.facts["verified_error"] = float(report.rel_error)
        self.facts["accuracy_pruned"] = evaluate(slim, self.data.test)
        write_text(self.folder / "plan.txt", f"{plan}\n")
        write_text(self.folder / PLAN, plan.to_json())
        write_atomically(self.folder / PRUNED, lambda file: pf.save(slim, plan, file))
        without_beta = evaluate(pf.slim(model, plan, fold="none"), self.data.test)
        self._note(
            f"Pruned: {100 * plan.flops_reduction:.1f} % of the MACs cut; accuracy "
            f"{self.facts['accuracy_dense']:.2f} % before, {self.facts['accuracy_pruned']:.2f} % "
            f"right after ({without_beta:.2f} % had the removed channels' β been dropped)"
        )
        self.stage = FINETUNE
        self._save(None)

    def _trainer(
        self,
        model: nn.Module,
        stage: Stage,
        scales: pf.ScalingFactors | None = None,
        regularizer: pf.Regularizer | None = None,
    ) -> Trainer:
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        trainer = Trainer(model, self.data, self.recipe, stage, generator, scales, regularizer)
        if self._trainer_state is not None:
            trainer.load_state_dict(self._trainer_state)
            self._trainer_state = None
        return trainer

    def _run_stage(self, trainer: Trainer) -> None:
        epochs = trainer.stage.epochs
        for observer in self.observers:
            observer.stage_started(self.stage, trainer.epoch, epochs)
        while trainer.epoch < epochs:
            start = time.perf_counter()
            loss = trainer.run_epoch()
            epoch = self._describe(trainer, loss, time.perf_counter() - start)
            self.history.append(epoch.to_dict())
            if epoch.gammas is not None:
                self.histograms.append(epoch.gammas.histogram)
            self._save(trainer)
            for observer in self.observers:
                observer.epoch_finished(epoch)

    def _describe(self, trainer: Trainer, loss: float, seconds: float) -> Epoch:
        gammas = None
        if trainer.scales is not None:
            plan = pf.plan(trainer.model, self.example, trainer.scales, method="valley")
            values = torch.cat([gamma.detach().flatten() for gamma in trainer.scales.values()])
            gammas = Gammas(values.float().cpu(), plan.flops_reduction)
        steps = trainer.steps_per_epoch * trainer.stage.epochs
        return Epoch(
            stage=self.stage,
            epoch=trainer.epoch,
            epochs=trainer.stage.epochs,
            index=len(self.history) + 1,
            loss=loss,
            accuracy=evaluate(trainer.model, self.data.test),
            lr=learning_rate(trainer.stage, trainer.step - 1, steps),
            seconds=seconds,
            gammas=gammas,
        )

    def _save(self, trainer: Trainer | None) -> None:
        now = time.perf_counter()
        self.facts["seconds"] += now - self._clock
        self._clock = now
        state = {
            "recipe": self.recipe.to_dict(),
            "stage": self.stage,
            "trainer": None if trainer is None else trainer.state_dict(),
            "history": self.history,
            "histograms": self.histograms,
            "facts": self.facts,
        }
        save_checkpoint(self.folder / CHECKPOINT, state)

    def _note(self, text: str) -> None:
        for observer in self.observers:
            observer.note(text)


def find_checkpoint(folder: Path, recipe: Recipe, must: bool = False) -> dict[str, Any] | None:
    """The checkpoint in ``folder`` that a run of ``recipe`` can go on from, if there is one.

    A finished run is gone on from only where ``must`` is set.

    Raises:
        ArgumentError: the checkpoint is of an unfinished run of another recipe; or ``must``, and
            there is none of this recipe.
        FileFormatError: the checkpoint is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        if must:
            raise ArgumentError(f"nothing to resume in '{folder}': it has no {CHECKPOINT}")
        return None
    state = load_checkpoint(path)
    finished = state["stage"] == DONE and (folder / RESULTS).is_file()
    other = differing_settings(state["recipe"], recipe.to_dict())
    if other and (must or not finished):
        raise ArgumentError(
            f"the {'finished' if finished else 'unfinished'} run in '{folder}' has other settings "
            f"({', '.join(other)}): name another folder, or delete its {CHECKPOINT}"
        )
    return state if must or not finished else None


def progress(folder: Path) -> str | None:
    """How far the interrupted run in ``folder`` is, in words; None where nothing can be resumed."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    state = load_checkpoint(path)
    if state["stage"] == DONE:
        return "after the last epoch"
    trainer = state["trainer"]
    if trainer is None:
        return "after pruning"
    done = sum(values["stage"] == state["stage"] for values in state["history"])
    return f"after epoch {done} of {state['stage']}"
