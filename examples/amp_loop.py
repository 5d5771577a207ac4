"""Sparsity training with mixed precision, clipping and accumulation: two ways to write it.

λ·∂R_s is added after clipping, to gradients that the loss scale has been divided out of, wherever
that happens. Runs in a few seconds on a GPU (float16) or a CPU (bfloat16, which needs no scaling:
the scaler is here to be seen).
"""

import torch
from plain_loop import accuracy, network, stripes
from torch import Tensor, nn
from torch.amp import GradScaler

import polarfast as pf

ACCUMULATE = 2


def main(attach: bool = False, epochs: int = 12) -> tuple[float, float]:
    """Returns accuracy right after pruning and the share of MACs cut."""
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

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return nn.functional.cross_entropy(model(images[batch]), labels[batch])

    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            for part in batch.chunk(ACCUMULATE):
                scaler.scale(loss_of(part) / ACCUMULATE).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if attach:
                scaler.step(optimizer)  # unchanged
            else:
                pf.step(optimizer, scales, reg, scaler=scaler)  # was: scaler.step(optimizer)
            scaler.update()
        schedule.step()

    plan = pf.plan(model, images[:1], scales)
    print(plan)
    test_images, test_labels = (tensor.to(device) for tensor in stripes(512, seed=1))
    return accuracy(pf.slim(model, plan), test_images, test_labels), plan.flops_reduction


if __name__ == "__main__":
    for attach in (False, True):
        accuracy_after, cut = main(attach)
        name = "pf.attach" if attach else "pf.step"
        print(f"{name}: accuracy after pruning {accuracy_after:.3f}, MACs cut {cut:.1%}")
