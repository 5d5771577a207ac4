"""Pruning a network that is trained already: gates of 1 leave what it has learned as it is.

Its γ have any size and sign by now; `pf.init_scales`, or the clamp of γ to [0, 1], would damage
them. So every prunable layer gets a gate, one more factor per channel, and the gates are polarized.
A small ResNet is trained on scikit-learn's digits without a thought of pruning, then pruned.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine.models import resnet


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] in an order of no meaning, and their labels [n]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(bunch.target)[order]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def train(model, images, labels, epochs, lr, scales=None, regularizer=None) -> None:
    """A plain loop; with `scales`, the step that polarizes them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if scales is None:
                optimizer.step()
            else:
                pf.step(optimizer, scales, regularizer)


def main(epochs: int = 12) -> dict[str, float]:
    """Train, polarize and fine-tune; returns accuracies in percent, and the share of MACs cut."""
    torch.manual_seed(0)
    images, labels = digits()
    learning, test = (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
    found = {}

    model = resnet(8, in_channels=1)  # in practice: a pretrained model is loaded here
    train(model, *learning, epochs, lr=0.05)
    found["pretrained"] = accuracy(model, *test)

    scales = pf.add_gates(model, images[:1], residual="expand")  # changes no output
    train(model, *learning, epochs, 0.05, scales, pf.Polarization(lam=1e-2, t=1.2))
    found["polarized"] = accuracy(model, *test)

    plan = pf.plan(model, images[:1], scales)
    slim = pf.slim(model, plan)  # the gates are multiplied into their layers
    found["pruned"] = accuracy(slim, *test)
    train(slim, *learning, epochs // 3, lr=0.005)
    found["fine-tuned"] = accuracy(slim, *test)
    found["MACs cut"] = 100 * plan.flops_reduction
    print(plan)
    print(", ".join(f"{name} {value:.2f} %" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
