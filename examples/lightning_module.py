"""Pruning in Lightning: the lines marked `# polarfast` are all that the module gains.

Lightning calls `optimizer.step(closure)` itself, and decides about accumulation, clipping and
precision; `pf.attach` in `configure_optimizers` serves all of it. Lightning asks for a new
optimizer in each `fit`, also when it resumes from a checkpoint: what is attached there is attached
anew, and attached once.
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import polarfast as pf
from polarfast.engine.models import resnet


class Digits(lightning.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = resnet(8, in_channels=1)
        example = torch.zeros(1, 1, 8, 8)
        self.scales = pf.scaling_factors(self.net, example, residual="expand")  # polarfast
        pf.init_scales(self.scales, 0.5)  # polarfast

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        pf.attach(optimizer, self.scales, pf.Polarization(lam=4e-3, t=1.2))  # polarfast
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return [optimizer], [schedule]


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] in an order of no meaning, and their labels [n]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(bunch.target)[order]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(epochs: int = 10, precision: str = "bf16-mixed") -> tuple[float, float, float]:
    """Returns accuracy before and right after pruning, and the share of MACs cut."""
    torch.manual_seed(0)
    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=25, shuffle=True)
    module = Digits()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        precision=precision,
        accumulate_grad_batches=2,
        gradient_clip_val=5.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)

    test_images, test_labels = (x[1200:].to(module.device) for x in (images, labels))
    plan = pf.plan(module.net, test_images[:1], module.scales)
    slim = pf.slim(module.net, plan)
    before = accuracy(module.net, test_images, test_labels)
    return before, accuracy(slim, test_images, test_labels), plan.flops_reduction


if __name__ == "__main__":
    before, after, cut = main()
    print(f"accuracy {before:.3f}, right after pruning {after:.3f}, MACs cut {cut:.1%}")
