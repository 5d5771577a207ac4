"""A share of MACs asked for: FlopsTarget's one training beside Algorithm 1's search, on digits.

ResNet-20 on scikit-learn's digits (16x16). Both train for 60 epochs with the same recipe, prune by
the valley rule and fine-tune for 30 epochs. Algorithm 1's trials end when F is stable; the λ and t
found are then trained in full. Epochs count everything up to fine-tuning.

    python benchmarks/bench_search.py [--cuts 0.3 0.5 0.7] [--seeds 0] [--folder bench_search]

About 15 minutes a cut and seed on one core. The journals in the folder let a killed run go on.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import build

BATCH, TRAIN_IMAGES = 50, 1000
EPOCHS, FINETUNE_EPOCHS = 60, 30
LAM_HIGH = 4e-3  # for 1,200 steps; 2e-4 is the paper's, for 78,000


def digits() -> tuple[Tensor, Tensor]:
    """Normalized images [1797, 1, 16, 16] and labels, shuffled."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(bundled.target).long()[order]
    images = (images - images[:TRAIN_IMAGES].mean()) / images[:TRAIN_IMAGES].std()
    return images, labels


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, each moved by up to 2 pixels."""
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    moves = torch.randint(5, (len(images), 2), generator=generator).tolist()
    parts = [padded[i, :, y : y + 16, x : x + 16] for i, (y, x) in enumerate(moves)]
    return torch.stack(parts)


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to 0."""
    warm = max(steps // 20, 1)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Task:
    """Digits, and how a network is trained and tested on them."""

    def __init__(self, seed: int) -> None:
        self.images, self.labels = digits()
        self.example, self.seed = self.images[TRAIN_IMAGES : TRAIN_IMAGES + 1], seed

    def network(self) -> tuple[nn.Module, pf.ScalingFactors]:
        """A fresh ResNet-20 and its scaling factors at 0.5."""
        torch.manual_seed(self.seed)
        model = build("resnet20", 10, 1)
        scales = pf.scaling_factors(model, self.example, residual="expand")
        pf.init_scales(scales, 0.5)
        return model, scales

    def epochs(
        self,
        model: nn.Module,
        epochs: int,
        peak: float,
        scales: pf.ScalingFactors | None = None,
        reg: pf.Regularizer | None = None,
    ) -> Iterator[int]:
        """Train; yields the number of epochs done after each."""
        optimizer = torch.optim.SGD(model.parameters(), peak, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(self.seed)
        steps, step = epochs * (TRAIN_IMAGES // BATCH), 0
        for epoch in range(epochs):
            model.train()
            for rows in torch.randperm(TRAIN_IMAGES, generator=generator).split(BATCH):
                optimizer.param_groups[0]["lr"] = rate(step, steps, peak)
                loss = F.cross_entropy(
                    model(shifted(self.images[rows], generator)), self.labels[rows]
                )
                optimizer.zero_grad()
                loss.backward()
                if scales is None or reg is None:
                    optimizer.step()
                else:
                    pf.step(optimizer, scales, reg)
                step += 1
            yield epoch + 1

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the 797 test images, in percent."""
        logits = model.eval()(self.images[TRAIN_IMAGES:])
        return 100 * float((logits.argmax(1) == self.labels[TRAIN_IMAGES:]).float().mean())

    def finish(self, model: nn.Module, scales: pf.ScalingFactors) -> tuple[float, float]:
        """Prune and fine-tune: the share cut, and the accuracy."""
        plan = pf.plan(model.eval(), self.example, scales)
        slim = pf.slim(model, plan)
        for _ in self.epochs(slim, FINETUNE_EPOCHS, 0.02):
            pass
        return plan.flops_reduction, self.accuracy(slim)


def one_training(task: Task, cut: float) -> tuple[float, float, int, int]:
    """FlopsTarget: share cut, accuracy, epochs, trainings."""
    model, scales = task.network()
    steps = EPOCHS * (TRAIN_IMAGES // BATCH)
    reg = pf.FlopsTarget(model, task.example, scales, cut, steps=steps)
    for _ in task.epochs(model, EPOCHS, 0.1, scales, reg):
        pass
    return *task.finish(model, scales), EPOCHS, 1


def algorithm_1(task: Task, cut: float, journal: Path) -> tuple[float, float, int, int]:
    """Algorithm 1, then a training in full: share cut, accuracy, epochs, trainings."""

    def train(lam: float, t: float) -> Iterator[float]:
        model, scales = task.network()
        predictor = pf.CutPredictor(model, task.example, scales)
        for _ in task.epochs(model, EPOCHS, 0.1, scales, pf.Polarization(lam, t)):
            yield predictor.cut()

    found = pf.search(train, cut, journal=journal, lam_high=LAM_HIGH)
    model, scales = task.network()
    for _ in task.epochs(model, EPOCHS, 0.1, scales, pf.Polarization(found.lam, found.t)):
        pass
    epochs = sum(trial.epochs for trial in found.trials) + EPOCHS
    return *task.finish(model, scales), epochs, len(found.trials) + 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("bench_search"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    print("asked  seed  method       cut    |F-F*|  fine-tuned  epochs  trainings", flush=True)
    for seed in options.seeds:
        task = Task(seed)
        for cut in options.cuts:
            journal = options.folder / f"cut{cut:g}-seed{seed}.jsonl"
            for name in ("FlopsTarget", "Algorithm 1"):
                if name == "FlopsTarget":
                    share, accuracy, epochs, trainings = one_training(task, cut)
                else:
                    share, accuracy, epochs, trainings = algorithm_1(task, cut, journal)
                off = 100 * abs(share - cut)
                print(
                    f"{cut:5.0%}  {seed:4d}  {name:11s}  {share:5.1%}  {off:3.1f}"
                    f" pt  {accuracy:8.2f} %  {epochs:6d}  {trainings:9d}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
