"""Pruning under FSDP2 (`fully_shard`): the lines marked `# <-` are all that the loop gains.

    torchrun --nproc-per-node=2 examples/fsdp_loop.py

One process per GPU with NCCL, or on the CPU with gloo. Each process holds a few channels of every
factor γ; a step all-reduces two numbers more. `fully_shard` replaces parameters, so the factors are
found before it and bound anew after it; a plan is made of a plain model with the trained state.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polarfast as pf


def network() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 32, 10)]
    return nn.Sequential(*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 32), *head)


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] in an order of no meaning, and their labels [n]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return images[order].to(device), torch.tensor(bunch.target)[order].to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(epochs: int = 12) -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    )
    torch.manual_seed(0)
    images, labels = digits(device)

    model = network().to(device)
    scales = pf.scaling_factors(model, images[:1])  # <- before fully_shard
    pf.init_scales(scales, 0.5)
    fully_shard(model, mesh=init_device_mesh(device.type, (world,)))
    scales = scales.rebind(model)  # <- after it
    regularizer = pf.Polarization(lam=2e-2, t=1.2)  # <-

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(1200)  # the same on every process: each has the same seed
        for batch in order.split(60):
            mine = batch[rank::world]
            loss = F.cross_entropy(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            pf.step(optimizer, scales, regularizer)  # <- instead of optimizer.step()
        schedule.step()

    whole = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=whole)  # every process takes part
    if rank == 0:
        plain = network().to(device)
        plain.load_state_dict(state)
        plan = pf.plan(plain, images[:1], scales.rebind(plain))
        slim = pf.slim(plain, plan)
        before, after = (accuracy(m, images[1200:], labels[1200:]) for m in (plain, slim))
        print(plan)
        print(f"accuracy: {before:.2f} % before pruning, {after:.2f} % right after")
        print(f"MACs cut: {100 * plan.flops_reduction:.1f} %")
    dist.barrier()  # torch may abort a process that leaves while another one works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
