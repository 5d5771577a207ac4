"""Pruning in a loop of Hugging Face Accelerate: the lines marked `# polarfast` are all it gains.

`accelerator.prepare` wraps the optimizer, and decides at each `optimizer.step()` whether it is one
(gradient accumulation) and whether a scaler has a say: so attach to the optimizer before that.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import polarfast as pf
from polarfast.engine.models import resnet


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] in an order of no meaning, and their labels [n]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(bunch.target)[order]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def train(accelerator, model, optimizer, schedule, loader, epochs: int) -> None:
    """The usual loop; nothing in it knows of pruning."""
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def main(epochs: int = 10) -> tuple[float, float, float]:
    """Returns accuracy before and right after pruning, and the share of MACs cut."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=25, shuffle=True)

    model = resnet(8, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scales = pf.scaling_factors(model, images[:1], residual="expand")  # polarfast
    pf.init_scales(scales, 0.5)  # polarfast
    pf.attach(optimizer, scales, pf.Polarization(lam=4e-3, t=1.2))  # polarfast
    steps = epochs * len(loader) // 2
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    train(accelerator, model, optimizer, schedule, loader, epochs)

    model = accelerator.unwrap_model(model)
    test_images, test_labels = (x[1200:].to(accelerator.device) for x in (images, labels))
    plan = pf.plan(model, test_images[:1], scales)
    slim = pf.slim(model, plan)
    before = accuracy(model, test_images, test_labels)
    return before, accuracy(slim, test_images, test_labels), plan.flops_reduction


if __name__ == "__main__":
    before, after, cut = main()
    print(f"accuracy {before:.3f}, right after pruning {after:.3f}, MACs cut {cut:.1%}")
