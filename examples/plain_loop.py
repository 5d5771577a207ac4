"""Pruning in a plain training loop: the lines marked `# <-` are all that it gains.

Trains a small ResNet on scikit-learn's digits, makes it slim, and shows what that saved.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import polarfast as pf
from polarfast.engine.models import resnet


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def main(epochs: int = 15) -> tuple[float, float, float]:
    """Train and prune; returns accuracy before and after pruning, in percent, and the MACs cut."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1000], order[1000:]

    model = resnet(14, in_channels=1)
    scales = pf.scaling_factors(model, images[:1], residual="expand")  # <- which γ take part
    pf.init_scales(scales, 0.5)
    regularizer = pf.Polarization(lam=3e-3, t=1.2)  # <-

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        model.train()
        for batch in train[torch.randperm(len(train))].split(50):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            pf.step(optimizer, scales, regularizer)  # <- instead of optimizer.step()

    before = accuracy(model, images[test], labels[test])
    plan = pf.plan(model, images[:1], scales)
    slim = pf.slim(model, plan)
    after = accuracy(slim, images[test], labels[test])
    print(plan)
    print(f"accuracy: {before:.2f} % before pruning, {after:.2f} % right after")
    return before, after, plan.flops_reduction


if __name__ == "__main__":
    main()
