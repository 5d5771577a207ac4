"""Gates: layers of torch with one more factor per output channel, initialised to 1.

Each class is a mixin over the torch class it stands in for: an instance gets a gate by a change of
its class, so that parameter names, hooks and modes stay with it, and loses it the same way.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_TransposedConv = nn.modules.conv._ConvTransposeNd


class Gated:
    """A layer whose output channels are multiplied by `gate`.

    Parameters:
        gate: [C_out].
    """

    gate: nn.Parameter
    #: The class this one stands in for: torch's, or one derived from it.
    plain: type[nn.Module]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gated"  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the class it stands in for: classes made by `gated_type` have no name to be found by.
        return _revive, (self.plain,), *super().__reduce_ex__(protocol)[2:]


class _GatedNorm(Gated):
    """(γ·gate)·x̂ + β·gate: the gate costs no pass over the activations, and no memory for one."""

    def forward(self, input: Tensor) -> Tensor:
        # The plain layer's own forward, on an object that differs in two tensors: whatever a
        # derived class does after normalizing, it does here, and threads do not meet.
        assert isinstance(self, nn.Module)
        tensors: dict[str, Any] = dict(self._parameters)
        tensors["weight"] = tensors["weight"] * self.gate
        if tensors["bias"] is not None:
            tensors["bias"] = tensors["bias"] * self.gate
        inner = object.__new__(self.plain)
        inner.__dict__.update(self.__dict__)
        inner.__dict__["_parameters"] = tensors
        return self.plain.forward(inner, input)


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

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(input, *args, **kwargs)  # type: ignore[misc]
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


class GatedConvTranspose1d(_GatedOutput, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a gate."""

    plain = nn.ConvTranspose1d


class GatedConvTranspose2d(_GatedOutput, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a gate."""

    plain = nn.ConvTranspose2d


class GatedConvTranspose3d(_GatedOutput, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a gate."""

    plain = nn.ConvTranspose3d


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
        GatedConvTranspose1d,
        GatedConvTranspose2d,
        GatedConvTranspose3d,
        GatedLinear,
    )
}


def gated_type(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The class with a gate for one of torch's layers, or for a class derived from one; None for
    other modules.
    """
    base = next((cls for cls in plain.__mro__ if cls in GATED), None)
    if base is None or base is plain:
        return GATED.get(plain)
    if base is nn.SyncBatchNorm:  # its output is multiplied, and what a derived class does to that
        return None
    norm = issubclass(base, nn.modules.batchnorm._BatchNorm)
    return _derived(plain, norm)  # type: ignore[arg-type]  # classes do hash


@cache  # one class for all layers alike
def _derived(plain: Any, norm: bool) -> type[nn.Module]:
    body = {"plain": plain, "__module__": __name__, "__doc__": f"`{plain.__name__}` with a gate."}
    return type(f"Gated{plain.__name__}", (_GatedNorm if norm else _GatedOutput, plain), body)


def own_forward(module: nn.Module) -> bool:
    """Whether a convolution or linear layer computes as torch's own class does."""
    plain = plain_type(module)
    base = next(cls for cls in plain.__mro__ if cls in GATED)
    names = ("forward", "_conv_forward")
    return all(getattr(plain, name, None) is getattr(base, name, None) for name in names)


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


def is_gate(name: str) -> bool:
    """Whether a parameter's name is that of a gate."""
    return name.rpartition(".")[2] == "gate"


def lost_gates(names: Iterable[str]) -> str:
    """One more cause for an error message where parameters are missing, if some of them are gates;
    else nothing.
    """
    if not any(map(is_gate, names)):
        return ""
    return (
        "; gates are lost where layers are replaced after pf.add_gates, as "
        "SyncBatchNorm.convert_sync_batchnorm does: convert first, then add gates"
    )


def open_gate(module: nn.Module) -> None:
    """Give a plain layer a gate of ones, which changes nothing."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    width = module.out_channels if isinstance(module, _TransposedConv) else weight.shape[0]
    ones = torch.ones(width, dtype=weight.dtype, device=weight.device)
    gated = gated_type(type(module))
    assert gated is not None
    module.register_parameter("gate", nn.Parameter(ones))
    module.__class__ = gated
    if isinstance(module, nn.Linear):
        module.register_forward_pre_hook(_is_called)


def drop_gate(module: Gated) -> None:
    """Make a gated layer the plain one again, without its gate."""
    assert isinstance(module, nn.Module)
    del module._parameters["gate"]
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _is_called]:
        del hooks[key]
    module.__class__ = module.plain  # type: ignore[assignment]


def fold_gate(module: Gated, full: Tensor, gate: Tensor) -> None:
    """Multiply a layer's weight or bias, full-size or cut like its gate, by its gate, in place,
    along the channels that the layer writes.
    """
    gate = gate.to(full.device, full.dtype)
    if not full.numel():
        return
    if isinstance(module, _TransposedConv) and full.dim() > 1:  # [C_in, C_out / groups, ...]
        groups = gate.numel() // full.shape[1]
        rows = full.view(groups, -1, *full.shape[1:])
        rows.mul_(gate.view(groups, 1, -1, *[1] * (full.dim() - 2)))
    else:
        full.mul_(gate.view(-1, *[1] * (full.dim() - 1)))


def _is_called(module: nn.Module, args: Any) -> None:
    """Does nothing. Torch's own fused layers (`nn.TransformerEncoderLayer` in eval mode) call a
    layer that has a hook; from one that has none they take the weights alone, past its gate.
    """


def _revive(plain: type[nn.Module]) -> nn.Module:
    """An empty gated layer, for copies and pickles to fill."""
    gated = gated_type(plain)
    assert gated is not None
    return object.__new__(gated)
