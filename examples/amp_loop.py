"""Sparsity training with mixed precision, clipping and accumulation, written in two ways.

λ·∂R_s is added after clipping, to gradients that the loss scale has been divided out of, wherever
that happens. Needs torch alone and a few seconds, on a GPU (float16) or a CPU (bfloat16, which
needs no scaling: the scaler is here to be seen). The data are stripes of four directions in noise.
"""

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import polarfast as pf

ACCUMULATE = 2


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n noisy images, [n, 1, 12, 12], and the direction of their stripes, [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    angle = (labels * torch.pi / 4)[:, None, None]
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    phase = 2 * torch.pi * torch.rand(n, 1, 1, generator=generator)
    images = torch.sin(1.5 * (angle.cos() * x + angle.sin() * y) + phase)
    return (images + 1.5 * torch.randn(images.shape, generator=generator))[:, None], labels


def network() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    return nn.Sequential(*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 32), *head)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(attach: bool = False, epochs: int = 12) -> tuple[float, float, float]:
    """Returns accuracy before and right after pruning, and the share of MACs cut."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    images, labels = (tensor.to(device) for tensor in stripes(512, seed=0))
    model = network().to(device)
    scales = pf.scaling_factors(model, images[:1])
    pf.init_scales(scales, 0.5)
    reg = pf.Polarization(lam=1e-2, t=1.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    scaler = GradScaler(device)
    if attach:  # for loops that are not yours: every later optimizer.step() does the work
        pf.attach(optimizer, scales, reg)

    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            for part in batch.chunk(ACCUMULATE):
                with torch.autocast(device, dtype):
                    loss = nn.functional.cross_entropy(model(images[part]), labels[part])
                scaler.scale(loss / ACCUMULATE).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if attach:
                scaler.step(optimizer)  # unchanged
            else:
                pf.step(optimizer, scales, reg, scaler=scaler)  # was: scaler.step(optimizer)
            scaler.update()
        schedule.step()

    plan = pf.plan(model, images[:1], scales)
    slim = pf.slim(model, plan)
    test_images, test_labels = (tensor.to(device) for tensor in stripes(512, seed=1))
    before = accuracy(model, test_images, test_labels)
    return before, accuracy(slim, test_images, test_labels), plan.flops_reduction


if __name__ == "__main__":
    for attach in (False, True):
        before, after, cut = main(attach)
        print(f"{'pf.attach' if attach else 'pf.step'}: accuracy {before:.3f}, ", end="")
        print(f"right after pruning {after:.3f}, MACs cut {cut:.1%}")
