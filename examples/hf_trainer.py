"""Pruning with Hugging Face's Trainer: the lines marked `# polarfast` are all that is added.

The Trainer takes an optimizer that is made for it. It restores that same optimizer's state when it
resumes from a checkpoint, so what is attached stays attached.
"""

import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import polarfast as pf
from polarfast.engine.models import resnet


class Network(nn.Module):
    """Returns the loss beside the logits, as the Trainer expects, when it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet(8, in_channels=1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(images)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Digits(Dataset):
    """scikit-learn's digits in an order of no meaning: images [1, 8, 8] and labels."""

    def __init__(self, start: int, stop: int) -> None:
        bunch = load_digits()
        order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
        self.images = images[order][start:stop]
        self.labels = torch.tensor(bunch.target)[order][start:stop]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def accuracy(model: nn.Module, data: Digits) -> float:
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model.eval()(data.images.to(device))["logits"]
    return (logits.argmax(1).cpu() == data.labels).float().mean().item()


def main(epochs: int = 10) -> tuple[float, float, float]:
    """Returns accuracy before and right after pruning, and the share of MACs cut."""
    torch.manual_seed(0)
    model, data, test = Network(), Digits(0, 1200), Digits(1200, 1797)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scales = pf.scaling_factors(model, test.images[:1], residual="expand")  # polarfast
    pf.init_scales(scales, 0.5)  # polarfast
    pf.attach(optimizer, scales, pf.Polarization(lam=4e-3, t=1.2))  # polarfast
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=25,
            gradient_accumulation_steps=2,
            max_grad_norm=5.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()

    plan = pf.plan(model, test.images[:1].to(trainer.args.device), scales)
    slim = pf.slim(model, plan)
    return accuracy(model, test), accuracy(slim, test), plan.flops_reduction


if __name__ == "__main__":
    before, after, cut = main()
    print(f"accuracy {before:.3f}, right after pruning {after:.3f}, MACs cut {cut:.1%}")
