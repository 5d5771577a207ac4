"""Networks at random: programs of the operators that real ones are made of, joined in any way."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU, nn.Sigmoid, nn.Identity)
Step = tuple[str, tuple[int, ...], Any]


class Program(nn.Module):
    """Steps, each of which reads earlier results and adds one; the last ones are averaged over
    places, joined, and read by a linear layer.
    """

    def __init__(self, seed: int, length: int = 9) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.shapes: list[tuple[int, int]] = [(3, 16)]  # channels, side of a 16x16 image's map
        self.layer("conv", 0)
        for _ in range(length):
            self.grow()
        read = {place for _, places, _ in self.steps for place in places}
        self.ends = [i for i in range(len(self.shapes)) if i not in read]
        self.fc = nn.Linear(sum(self.shapes[i][0] for i in self.ends), 4)

    def grow(self) -> None:
        """One more step, of a kind and on results that fit."""
        kinds = "conv conv conv depthwise add add cat gate pool up halves shuffle slice same"
        kind, draw = self.draw.choice(kinds.split()), self.draw
        place = draw.randrange(max(1, len(self.shapes) - 3), len(self.shapes))
        channels, side = self.shapes[place]
        if kind in ("conv", "depthwise"):
            self.layer(kind, place)
        elif kind in ("add", "cat"):
            fits = [
                i
                for i, (c, s) in enumerate(self.shapes)
                if i and i != place and s == side and (kind == "cat" or c == channels)
            ]
            if fits:
                other = draw.choice(fits)
                total = channels + self.shapes[other][0] if kind == "cat" else channels
                self.add(kind, (place, other), None, (total, side))
        elif kind == "gate":
            self.layers.append(nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid()))
            self.add(kind, (place,), len(self.layers) - 1, (channels, side))
        elif kind == "pool" and side >= 4:
            self.add(kind, (place,), draw.choice(("max", "avg", "padded")), (channels, side // 2))
        elif kind == "up" and side <= 8:
            self.add(kind, (place,), None, (channels, side * 2))
        elif kind == "halves" and channels % 2 == 0 and channels > 2:
            self.add(kind, (place,), draw.choice(("swap", "gate")), (channels, side))
            if self.steps[-1][2] == "gate":
                self.shapes[-1] = (channels // 2, side)
        elif kind == "shuffle" and channels % 2 == 0:
            self.add(kind, (place,), None, (channels, side))
        elif kind == "slice" and channels > 3:
            self.add(kind, (place,), None, (channels - 2, side))
        elif kind == "same":
            self.add(
                kind, (place,), draw.choice(("relu", "softmax", "roll", "clamp")), (channels, side)
            )

    def add(self, kind: str, places: tuple[int, ...], detail: Any, shape: tuple[int, int]) -> None:
        self.steps.append((kind, places, detail))
        self.shapes.append(shape)

    def layer(self, kind: str, place: int) -> None:
        """A convolution, mostly with a norm and an activation."""
        draw, (channels, side) = self.draw, self.shapes[place]
        stride = draw.choice((1, 1, 2)) if side >= 8 else 1
        kernel = draw.choice((1, 3))
        groups, width = 1, draw.choice((4, 6, 8))
        if kind == "depthwise":
            groups = width = channels
        elif channels % 2 == 0 and draw.random() < 0.2:
            groups = 2
        norm = draw.random() < 0.85
        parts: list[nn.Module] = [
            nn.Conv2d(
                channels,
                width,
                kernel,
                stride,
                kernel // 2,
                groups=groups,
                bias=not norm or draw.random() < 0.2,
            )
        ]
        if norm:
            parts.append(nn.BatchNorm2d(width))
        parts.append(draw.choice(ACTIVATIONS)())
        self.layers.append(nn.Sequential(*parts))
        self.add("layer", (place,), len(self.layers) - 1, (width, -(-side // stride)))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for kind, places, detail in self.steps:
            found.append(self.run(kind, [found[place] for place in places], detail))
        return self.fc(torch.cat([found[i].mean((2, 3)) for i in self.ends], 1))

    def run(self, kind: str, xs: list[Tensor], detail: Any) -> Tensor:
        x = xs[0]
        if kind == "layer":
            return self.layers[detail](x)
        if kind == "add":
            return x + xs[1]
        if kind == "cat":
            return torch.cat(xs, 1)
        if kind == "gate":
            return x * self.layers[detail](x.mean((2, 3), keepdim=True))
        if kind == "pool":
            if detail == "max":
                return F.max_pool2d(x, 2)
            return (
                F.avg_pool2d(x, 2)
                if detail == "avg"
                else F.avg_pool2d(x, 3, 2, 1)[:, :, : x.shape[2] // 2, : x.shape[3] // 2]
            )
        if kind == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        if kind == "halves":
            one, other = x.chunk(2, 1)
            return torch.cat([other, one], 1) if detail == "swap" else one * other.sigmoid()
        if kind == "shuffle":
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if kind == "slice":
            return x[:, 1:-1]
        if detail == "softmax":
            return x.flatten(2).softmax(2).unflatten(2, x.shape[2:])
        if detail == "roll":
            return x.roll(1, 3)
        return x.clamp(-0.5, 2) if detail == "clamp" else x.relu()
