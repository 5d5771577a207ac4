"""Pruning with timm: its model, its optimizer factory, its schedule, its loss scaler.

The lines marked `# polarfast` are all that the loop gains. timm's factory puts the γ (every 1-D
parameter) into the group without weight decay. Attach to whatever the factory returns, Lookahead
included ("lookahead_adamw").
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler
from torch import Tensor, nn

import polarfast as pf


def network() -> nn.Module:
    """A narrow ResNet of four blocks; the stem does not pool, as the images are 8 × 8."""
    return timm.create_model(
        "resnet10t", in_chans=1, num_classes=10, channels=(32, 32, 64, 64), stem_width=16
    )


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 16, 16] in an order of no meaning, and their labels [n]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, scale_factor=2)[order], torch.tensor(bunch.target)[order]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def train(model, optimizer, images: Tensor, labels: Tensor, epochs: int, device: str) -> None:
    """timm's loop, on a GPU with mixed precision; nothing in it knows of pruning."""
    schedule = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    loss_scaler = NativeScaler(device)
    for epoch in range(epochs):
        schedule.step(epoch)
        model.train()
        for batch in torch.randperm(len(images)).split(50):
            with torch.autocast(device, torch.float16, enabled=device == "cuda"):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss_scaler(loss, optimizer, clip_grad=5.0, parameters=model.parameters())


def main(name: str = "lamb", epochs: int = 8) -> tuple[float, float, float]:
    """Returns accuracy before and right after pruning, and the share of MACs cut."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (x.to(device) for x in digits())
    model = network().to(device)
    optimizer = create_optimizer_v2(model, opt=name, lr=0.03, weight_decay=0.02)
    scales = pf.scaling_factors(model, images[:1], residual="expand")  # polarfast
    pf.init_scales(scales, 0.5)  # polarfast
    pf.attach(optimizer, scales, pf.Polarization(lam=1e-2, t=1.2))  # polarfast
    train(model, optimizer, images[:1200], labels[:1200], epochs, device)

    plan = pf.plan(model, images[:1], scales)
    slim = pf.slim(model, plan)
    before = accuracy(model, images[1200:], labels[1200:])
    return before, accuracy(slim, images[1200:], labels[1200:]), plan.flops_reduction


if __name__ == "__main__":
    for name in ("lamb", "lookahead_adamw"):
        before, after, cut = main(name)
        print(f"{name}: accuracy {before:.3f}, right after pruning {after:.3f}, MACs cut {cut:.1%}")
