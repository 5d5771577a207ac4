"""What pruned networks are tested against. Nothing here knows a pruner."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .pruners import Channels

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Largest error that is rounding, in float64, as a share of the output's variation.
TOLERANCE = 1e-10


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """γ name -> its BatchNorm."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and module.affine
    }


@torch.no_grad()
def randomize(model: nn.Module, inputs: Any, seed: int = 0) -> nn.Module:
    """As after training, in float64: random γ and β, BatchNorm statistics near those
    of real activations, so that deep networks neither explode nor die out, but random; no two
    numbers of a tensor are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double()

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        drawn = torch.rand(like.shape, dtype=torch.float64, generator=generator)
        return low + (high - low) * drawn

    for param in model.parameters():  # many biases start at 0, and float32 knows few numbers
        param += (
            0.02 * uniform(param, -1.0, 1.0) if param.dim() == 1 else 1e-6 * uniform(param, 0, 1)
        )
    hooks = []
    for module in norms(model).values():
        module.weight.copy_(uniform(module.weight, 0.5, 1.0))
        module.bias.normal_(generator=generator)
        module.running_mean.normal_(generator=generator)
        module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))

        def measure(norm: Any, args: Any) -> None:
            var, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1, correction=0)
            var = var + 1e-3 * (1 + mean.square())
            norm.running_mean.copy_(mean + 0.3 * var.sqrt() * uniform(mean, -1.0, 1.0))
            norm.running_var.copy_(var * uniform(var, 0.7, 1.4))

        hooks.append(module.register_forward_pre_hook(measure))
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def half(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """A random half of the channels of each of these γ: one of every two neighbours, the same for
    all layers of one width, so that channels which must go together are asked for together and
    every group of a grouped convolution loses as many.
    """
    wanted = {}
    for name in names:
        pairs = model.get_parameter(name).numel() // 2
        generator = torch.Generator().manual_seed(pairs)
        wanted[name] = 2 * torch.arange(pairs) + torch.randint(2, (pairs,), generator=generator)
    return wanted


@torch.no_grad()
def set_zero(model: nn.Module, channels: Channels, beta: bool) -> nn.Module:
    """γ, and with `beta` β too, of these channels become 0, in place."""
    for name, gone in channels.items():
        model.get_parameter(name)[gone] = 0
        bias = model.get_submodule(name.rpartition(".")[0]).bias
        if beta and bias is not None:
            bias[gone] = 0
    return model


@torch.no_grad()
def silence(model: nn.Module, inputs: Any) -> None:
    """Where a BatchNorm's input channel is 0 whatever the network's input is, as behind the
    depthwise convolution of a channel set to 0, its γ and β become 0 too. In the order of the
    forward pass, so that it reaches as far as the zeros do.
    """

    def spread(norm: Any, args: Any) -> None:
        silent = args[0].transpose(0, 1).flatten(1).eq(0).all(1)
        norm.weight[silent] = 0
        norm.bias[silent] = 0

    hooks = [norm.register_forward_pre_hook(spread) for norm in norms(model).values()]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()


def zeros(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The channels of these γ that are 0."""
    return {name: (model.get_parameter(name) == 0).nonzero().flatten() for name in names}


def running(model: nn.Module, inputs: Any) -> set[str]:
    """The γ of the norms that run on these inputs."""
    found: set[str] = set()
    hooks = [
        norm.register_forward_pre_hook(lambda *_, name=name: found.add(name))
        for name, norm in norms(model).items()
    ]
    try:
        outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def masked(model: nn.Module, channels: Channels, beta: bool) -> nn.Module:
    """A copy of the network with γ (and β) of the removed channels 0."""
    return set_zero(copy.deepcopy(model), channels, beta)


def leaves(result: Any) -> list[Tensor]:
    """All tensors in what a network returned, however nested."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that the network returns; one that draws noise draws the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return leaves(model(inputs))


def same(one: nn.Module, other: nn.Module, inputs: Any) -> bool:
    """Whether two networks return the same, bit for bit."""
    pairs = zip(outputs(one, inputs), outputs(other, inputs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def error(reference: nn.Module, candidate: nn.Module, inputs: Tensor) -> float:
    """Largest difference of any output, as a share of how much that output varies over the inputs
    (the largest range of any of its elements). An untrained network's output hardly depends on its
    input; measured against its size, a broken one would pass.
    """
    worst = 0.0
    wanted, got = outputs(reference, inputs), outputs(candidate, inputs)
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in wanted]
    for a, b in zip(wanted, got, strict=True):
        variation = float((a.amax(0) - a.amin(0)).max())
        assert variation > 0
        worst = max(worst, float((a - b).abs().max()) / variation)
    return worst


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of convolutions and linear layers, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(param.numel() for param in model.parameters())


def variances(model: nn.Module) -> dict[str, Tensor]:
    """γ name -> its running variance, which `randomize` makes another number for every channel."""
    return {name: norm.running_var.clone() for name, norm in norms(model).items()}


def gone(before: dict[str, Tensor], after: nn.Module) -> dict[str, Tensor]:
    """γ name -> the channels that are gone, by the `variances` that are not there any more: for
    libraries that do not say what they removed.
    """
    left = variances(after)
    empty = torch.empty(0, dtype=torch.float64)
    lost = {name: ~torch.isin(var, left.get(name, empty)) for name, var in before.items()}
    return {name: mask.nonzero().flatten() for name, mask in lost.items() if mask.any()}
