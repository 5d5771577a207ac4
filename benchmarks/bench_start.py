"""When to begin: a small U-Net in a short training, losing channels from some part of it on.

Images of 64×64 with circles, squares and triangles, to be told apart pixel by pixel; 9 epochs of 80
steps (of twice 4 images), AdamW, γ in a group of their own, one cycle of the learning rate.
`FlopsTarget` cuts half of the MACs between `start` and seven tenths of the training. Mean
intersection over union of 256 other images, right after pruning, without fine-tuning. "never": the
same training without a penalty.

Expected: a network that loses channels before it has learned what tells the classes apart learns
that later or not at all; from the middle on, it keeps what it has learned.

    OMP_NUM_THREADS=1 python benchmarks/bench_start.py [--starts 0.1 0.4] [--seeds 0 1 2]

About a minute a training on one core.
"""

import argparse
import statistics
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polarfast as pf
from polarfast.steering import flops_target

CLASSES, SIZE, EPOCHS, WIDTH = 4, 64, 9, 12
BATCH, ACCUMULATE = 4, 2
RATE, GAMMA_RATE = 4e-3, 2e-2


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 64, 64] and the class of each pixel, 0 for the background."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    y, x = torch.meshgrid(*[torch.arange(SIZE).float()] * 2, indexing="ij")
    pictures = torch.empty(count, 3, SIZE, SIZE)
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for picture, labels in zip(pictures, classes, strict=True):
        coarse = draw(3, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
        picture.copy_(0.5 * draw(3, 1, 1) + 0.3 * coarse)
        for _ in range(int(torch.randint(2, 5, (), generator=generator))):
            kind = int(torch.randint(CLASSES - 1, (), generator=generator))
            (cx, cy), size = (draw(2) * SIZE).tolist(), 6 + 10 * float(draw())
            right, down = (x - cx).abs(), y - cy
            shape = (
                right**2 + down**2 < size**2,
                (right < 0.85 * size) & (down.abs() < 0.85 * size),
                (down < 0.8 * size) & (1.6 * right < down + size),
            )[kind]
            picture.copy_(torch.where(shape, 0.8 * draw(3, 1, 1) + 0.1 * draw(), picture))
            labels[shape] = kind + 1
        picture += 0.05 * torch.randn(3, SIZE, SIZE, generator=generator)
    return (pictures - 0.5) / 0.3, classes


def double(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (n_in, n_out):
        conv = nn.Conv2d(channels, n_out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels; heads at the two lower ones in training."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(map(double, (3, *widths), widths))
        pairs = list(zip(widths, widths[1:], strict=False))
        self.widen = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(b, a, 2, 2), nn.BatchNorm2d(a), nn.ReLU())
            for a, b in pairs
        )
        self.up = nn.ModuleList(double(2 * a, a) for a, _ in pairs)
        self.heads = nn.ModuleList(nn.Conv2d(a, CLASSES, 1) for a, _ in pairs)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        kept = []
        for down in self.down:
            x = down(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        found = []
        for level in (2, 1, 0):
            x = self.up[level](torch.cat([kept[level], self.widen[level](x)], 1))
            if self.training or level == 0:
                found.insert(0, self.heads[level](x))
        return found if self.training else found[0]


def loss_of(outputs: list[Tensor], labels: Tensor) -> Tensor:
    resized = [F.interpolate(out.float(), size=labels.shape[1:]) for out in outputs]
    losses = [F.cross_entropy(out, labels) for out in resized]
    return losses[0] + 0.3 * (losses[1] + losses[2])


@torch.no_grad()
def overlap(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes, in percent."""
    counts = torch.zeros(CLASSES, CLASSES)
    for x, y in zip(pictures.split(64), labels.split(64), strict=True):
        pairs = y * CLASSES + model.eval()(x).argmax(1)
        counts += torch.bincount(pairs.flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    both = counts.diag()
    return 100 * float((both / (counts.sum(0) + counts.sum(1) - both)).mean())


def train(start: float | None, seed: int) -> tuple[float, float]:
    """(share of MACs cut, overlap of the slim model) after a training."""
    torch.manual_seed(seed)
    (pictures, labels), held_out = images(640, 0), images(256, 1)
    model, x = UNet(), pictures[:2]
    scales = pf.scaling_factors(model, x)
    pf.init_scales(scales, 0.5)
    steps = EPOCHS * len(pictures) // (BATCH * ACCUMULATE)
    flops_target.FIRST = start or flops_target.FIRST
    reg = None if start is None else pf.FlopsTarget(model, x, scales, cut=0.5, steps=steps)
    gammas = {id(gamma) for gamma in scales.values()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in gammas]},
        {"params": list(scales.values()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, GAMMA_RATE], steps)
    for _ in range(EPOCHS):
        for number, rows in enumerate(torch.randperm(len(pictures)).split(BATCH), 1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model.train()(pictures[rows]), labels[rows])
            (loss / ACCUMULATE).backward()
            if number % ACCUMULATE:
                continue
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if reg is None:
                optimizer.step()
            else:
                pf.step(optimizer, scales, reg)
            optimizer.zero_grad()
            schedule.step()
    if reg is None:
        return 0.0, overlap(model, *held_out)
    plan = pf.plan(model, x, scales)
    return plan.flops_reduction, overlap(pf.slim(model, plan), *held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--starts", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| channels go from | MACs cut % | mean IoU % | of each seed |")
    print("|---|---:|---:|---|", flush=True)
    for start in (None, *options.starts):
        found = [train(start, seed) for seed in options.seeds]
        cuts, overlaps = zip(*found, strict=True)
        each = ", ".join(f"{value:.1f}" for value in overlaps)
        name = "never" if start is None else f"{start:.0%} of the training on"
        cut, mean = 100 * statistics.fmean(cuts), statistics.fmean(overlaps)
        print(f"| {name} | {cut:.1f} | {mean:.1f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
