"""Gates: layers of torch with one more factor per output channel, initialised to 1.

Each class is a mixin over the torch class it stands in for: an instance gets a gate by a change of
its class, so that parameter names, hooks and modes stay with it, and loses it the same way.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gated:
    """A layer whose output channels are multiplied by `gate`.

    Parameters:
        gate: [C_out].
    """

    gate: nn.Parameter
    #: The torch class this one stands in for.
    plain: type[nn.Module]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gated"  # type: ignore[misc]


class _GatedNorm(Gated):
    """(γ·gate)·x̂ + β·gate: the gate costs no pass over the activations, and no memory for one."""

    def forward(self, input: Tensor) -> Tensor:
        # As torch's own, but for the last two tensors.
        assert isinstance(self, nn.modules.batchnorm._BatchNorm)
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight * self.gate,
            None if self.bias is None else self.bias * self.gate,
            of_batch,
            factor,
            self.eps,
        )


class GatedBatchNorm1d(_GatedNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with a gate."""

    plain = nn.BatchNorm1d


class GatedBatchNorm2d(_GatedNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with a gate."""

    plain = nn.BatchNorm2d


class GatedBatchNorm3d(_GatedNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with a gate."""

    plain = nn.BatchNorm3d


class _GatedOutput(Gated):
    """The layer's output times the gate."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)  # type: ignore[misc]
        spatial = out.dim() - 2
        if isinstance(self, nn.Linear):
            spatial = 0
        elif isinstance(self, nn.modules.conv._ConvNd):
            spatial = len(self.kernel_size)  # an input may come without a batch dimension
        # Autocast multiplies in the wider dtype of the two.
        return out * self.gate.to(out.dtype).view(-1, *[1] * spatial)


class GatedSyncBatchNorm(_GatedOutput, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` with a gate."""

    plain = nn.SyncBatchNorm


class GatedConv1d(_GatedOutput, nn.Conv1d):
    """`nn.Conv1d` with a gate."""

    plain = nn.Conv1d


class GatedConv2d(_GatedOutput, nn.Conv2d):
    """`nn.Conv2d` with a gate."""

    plain = nn.Conv2d


class GatedConv3d(_GatedOutput, nn.Conv3d):
    """`nn.Conv3d` with a gate."""

    plain = nn.Conv3d


class GatedLinear(_GatedOutput, nn.Linear):
    """`nn.Linear` with a gate."""

    plain = nn.Linear


#: Torch class -> the class with a gate.
GATED: dict[type[nn.Module], type[nn.Module]] = {
    cls.plain: cls
    for cls in (
        GatedBatchNorm1d,
        GatedBatchNorm2d,
        GatedBatchNorm3d,
        GatedSyncBatchNorm,
        GatedConv1d,
        GatedConv2d,
        GatedConv3d,
        GatedLinear,
    )
}


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's class, without a gate."""
    return module.plain if isinstance(module, Gated) else type(module)


def gated_modules(model: nn.Module) -> Iterator[tuple[str, Gated]]:
    """The modules that have gates, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Gated):
            yield name, module


def gate_name(module_name: str) -> str:
    """The name of a module's gate."""
    return f"{module_name}.gate" if module_name else "gate"


def open_gate(module: nn.Module) -> None:
    """Give a plain layer a gate of ones, which changes nothing."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    ones = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    module.register_parameter("gate", nn.Parameter(ones))
    module.__class__ = GATED[type(module)]


def drop_gate(module: Gated) -> None:
    """Make a gated layer the plain one again, without its gate."""
    assert isinstance(module, nn.Module)
    del module._parameters["gate"]
    module.__class__ = module.plain  # type: ignore[assignment]


def fold_gate(full: Tensor, gate: Tensor) -> None:
    """Multiply the rows of a layer's weight or bias by its gate, in place."""
    full.mul_(gate.to(full.device, full.dtype).view(-1, *[1] * (full.dim() - 1)))
