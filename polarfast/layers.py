"""Layers of torch that do a little more: with a gate, with channels put back at their places, or
without any channel; and SyncBatchNorm for all of these.

Each is a mixin over the torch class it stands in for: an instance changes its class, so that
parameter names, hooks and modes stay with it and `isinstance` holds.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .kernels.put_back import in_transform, put_back, put_back_norm, takes_kernel

Kinds = tuple[type[nn.Module], ...]
NORMS: Kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS: Kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Torch's layers that can have a gate.
GATEABLE: Kinds = (*NORMS, *CONVS, *TRANSPOSED, nn.Linear)


class Variant:
    """A layer of one of torch's classes, or of one derived from these, that does something more."""

    #: What class names begin with.
    prefix: ClassVar[str]
    #: The class this one stands in for.
    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Classes made by `_variant` have no name that they could be found by.
        extra = next(cls for cls in type(self).__mro__[1:] if issubclass(cls, Variant))
        return _revive, (extra, self.plain), *super().__reduce_ex__(protocol)[2:]


def _make_variant(extra: type[Variant], plain: type[nn.Module]) -> type[nn.Module]:
    name = f"{extra.prefix}{plain.__name__}"
    return type(name, (extra, plain), {"plain": plain, "__module__": __name__})


#: The class that does what a mixin adds to a plain layer: one for all layers alike. Holds for good,
#: and keeps classes derived from torch's alive.
_variant: Callable[[type[Variant], type[nn.Module]], type[nn.Module]] = cache(
    _make_variant  # type: ignore[assignment]
)


def _revive(extra: type[Variant], plain: type[nn.Module]) -> nn.Module:
    """An empty layer, for copies and pickles to fill."""
    return object.__new__(_variant(extra, plain))


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what a variant adds."""
    return module.plain if isinstance(module, Variant) else type(module)


# --- gates


class Gated(Variant):
    """A layer whose output channels are multiplied by `gate`.

    Parameters:
        gate: [C_out].
    """

    prefix = "Gated"
    gate: nn.Parameter

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gated"  # type: ignore[misc]


class GatedNorm(Gated):
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


class GatedOutput(Gated):
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


def gated_type(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The class with a gate for one of torch's layers, or for a class derived from one; None for
    other modules.
    """
    base = next((cls for cls in plain.__mro__ if cls in GATEABLE), None)
    if base is nn.SyncBatchNorm and base is not plain:
        return None  # its output is multiplied, and what a derived class does to that
    if base is None:
        return None
    folds = base in NORMS and base is not nn.SyncBatchNorm
    return _variant(GatedNorm if folds else GatedOutput, plain)


def own_forward(module: nn.Module) -> bool:
    """Whether a convolution or linear layer computes as torch's own class does."""
    plain = plain_type(module)
    base = next(cls for cls in plain.__mro__ if cls in GATEABLE)
    names = ("forward", "_conv_forward")
    return all(getattr(plain, name, None) is getattr(base, name, None) for name in names)


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
    width = weight.shape[0]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        width = module.out_channels
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


def multiply_outputs(module: object, full: Tensor, gate: Tensor) -> None:
    """Multiply a layer's weight or bias, full-size or cut like its gate, by a gate or another
    factor, in place, along the channels that the layer writes.
    """
    gate = gate.to(full.device, full.dtype)
    if not full.numel():
        return
    if isinstance(module, TRANSPOSED) and full.dim() > 1:  # [C_in, C_out / groups, ...]
        groups = gate.numel() // full.shape[1]
        rows = full.view(groups, -1, *full.shape[1:])
        rows.mul_(gate.view(groups, 1, -1, *[1] * (full.dim() - 2)))
    else:
        full.mul_(gate.view(-1, *[1] * (full.dim() - 1)))


def _is_called(module: nn.Module, args: Any) -> None:
    """Does nothing. Torch's own fused layers (`nn.TransformerEncoderLayer` in eval mode) call a
    layer that has a hook; from one that has none they take the weights alone, past its gate.
    """


# --- put-back, and layers without channels


def _nothing(norm: object, input: Tensor) -> Tensor:
    """[N, 0, *]: what a normalization makes of no channels.

    Its parameters take part, as every reader of nothing below adds the sum over nothing, 0: each
    then has a gradient (of no elements), which DistributedDataParallel waits for.
    """
    assert isinstance(norm, nn.Module)
    for parameter in norm.parameters(recurse=False):
        input = input + parameter.sum().to(input.dtype)
    return input


def _is_affine(norm: nn.modules.batchnorm._BatchNorm, input: Tensor) -> bool:
    """Whether all that is to do is y = a·x + b, for a kernel, and no gradient will follow."""
    if torch.compiler.is_compiling() or norm.training or norm.running_mean is None:
        return False
    if torch.is_grad_enabled():
        tensors = (input, norm.weight, norm.bias)
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return False
    norm._check_input_dim(input)
    return takes_kernel(input)


#: The buffer of a `PutBack` that says where its channels go.
PUT_BACK_INDEX = "put_back_index"


class Places(nn.Module):
    """A module whose buffer `put_back_index` nothing but loading writes.

    Averages of weights write to all buffers, and round whole numbers down: 7 becomes 6. So the
    places are kept twice, and a write is undone before they are used, moved, copied or saved.

    Buffers:
        put_back_index: int64 [kept], the place of each kept channel in the output.
        put_back_constant: [width], what the removed channels are: their β, or 0 where β was
            dropped.
    """

    put_back_index: Tensor
    put_back_constant: Tensor

    def hold(self, index: Tensor, constant: Tensor) -> None:
        """Register where the kept channels go and what stands in the other places."""
        self.register_buffer("put_back_index", index)
        self.register_buffer("put_back_constant", constant)
        self._note(index.clone())

    def _note(self, places: Tensor) -> None:
        index = self.put_back_index
        self._places = places
        #: The buffer that holds them, as of which write; torch does not count all of them.
        self._held = (0, 0) if index.is_inference() else (id(index), index._version)

    def put_right(self) -> None:
        """Undo a write to the buffer. Another tensor in its place says what is right."""
        if torch.compiler.is_compiling():
            return
        index = self._buffers["put_back_index"]
        assert index is not None
        holder, version = self._held
        same = holder == id(index)
        if (same and version == index._version) or in_transform() or index.is_inference():
            return
        if same:
            with torch.no_grad():
                index.copy_(self._places)
            self._note(self._places)
        else:
            self._note(index.detach().clone())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.put_right()
        super()._apply(fn, recurse)
        self._note(fn(self._places))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.put_right()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.put_right()
        super()._load_from_state_dict(*args)
        self._note(self.put_back_index.detach().clone())

    def __getstate__(self) -> Any:
        self.put_right()
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._note(self._places)


class PutBack(Variant, Places):
    """A normalization of the kept channels whose output has the full width again ("expand")."""

    prefix = "PutBack"

    def forward(self, input: Tensor) -> Tensor:
        self.put_right()
        index, constant = self.put_back_index, self.put_back_constant
        assert isinstance(self, nn.modules.batchnorm._BatchNorm)
        if not self.num_features:  # a number of Python's, which torch.jit.trace need not trace
            return self._constant(_nothing(self, input))
        if _is_affine(self, input):
            return put_back_norm(
                input,
                index,
                constant,
                self.weight,
                self.bias,
                cast(Tensor, self.running_mean),
                cast(Tensor, self.running_var),
                self.eps,
            )
        return put_back(super().forward(input), index, constant)

    def _constant(self, nothing: Tensor) -> Tensor:
        """The output of a normalization that kept no channel, from its input [N, 0, *]."""
        channels = self.put_back_constant.to(nothing.dtype) + nothing.sum()
        shape = (nothing.shape[0], channels.numel(), *nothing.shape[2:])
        # Memory of its own: networks add onto a branch in place.
        return channels.view(1, -1, *[1] * (nothing.dim() - 2)).expand(shape).contiguous()


class PutBackAlone(Places):
    """What is left of a `PutBack` whose normalization was folded into the layer before it."""

    def __init__(self, index: Tensor, constant: Tensor) -> None:
        super().__init__()
        self.hold(index, constant)

    def forward(self, input: Tensor) -> Tensor:
        self.put_right()
        return put_back(input, self.put_back_index, self.put_back_constant.to(input.dtype))


class SilentNorm(Variant):
    """A normalization of no channels (torch's own refuses them)."""

    prefix = "Silent"

    def forward(self, input: Tensor) -> Tensor:
        return _nothing(self, input)


class SilentConv(Variant):
    """A convolution without input or without output channels: no multiplication, the output's shape
    and the bias.
    """

    prefix = "Silent"

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self, nn.modules.conv._ConvNd)
        if isinstance(self.padding, str):
            raise NotImplementedError("padding given as a string")  # excluded when the plan is made
        geometry = zip(
            input.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        )
        # Integers all the way, so that sizes stay symbolic when the network is exported.
        space = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
        channels = self.weight.flatten(1).sum(1)  # [C_out], over no input channels: 0
        if self.bias is not None:
            channels = channels + self.bias
        if not self.in_channels:
            channels = channels + input.sum()
        shape = (input.shape[0], self.out_channels, *space)
        # Memory of its own: networks write into what a layer returns.
        return channels.to(input.dtype).view(1, -1, *[1] * len(space)).expand(shape).contiguous()


#: Torch class -> the class that puts channels back.
PUT_BACK = {norm: _variant(PutBack, norm) for norm in NORMS}
#: Torch class -> the class that works without channels; nn.Linear itself does.
SILENT = {
    **{norm: _variant(SilentNorm, norm) for norm in NORMS},
    **{conv: _variant(SilentConv, conv) for conv in CONVS},
    nn.Linear: nn.Linear,
}


def put_back_type(module: nn.Module) -> type[nn.Module] | None:
    """The class that puts back the channels of a normalization, of torch's or one derived from it
    that does nothing more than normalize (timm's, without an activation); None for other modules.
    """
    plain = plain_type(module)
    if plain in PUT_BACK:
        return PUT_BACK[plain]
    if issubclass(plain, NORMS) and not issubclass(plain, nn.SyncBatchNorm):
        return _variant(PutBack, plain) if _only_normalizes(module, plain) else None
    return None


def _only_normalizes(module: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether a norm of a derived class computes what torch's own does, by trying it."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    width = module.num_features
    ones, zeros = torch.ones(width, device="cpu"), torch.zeros(width, device="cpu")
    inner = object.__new__(plain)
    inner.__dict__.update(module.__dict__, training=False)
    inner.__dict__["_parameters"] = {"weight": ones, "bias": zeros}
    inner.__dict__["_buffers"] = {"running_mean": zeros, "running_var": ones}
    spatial = next(n for n, norm in enumerate(NORMS, 1) if issubclass(plain, norm))
    input = torch.linspace(-10, 10, width * 3**spatial, device="cpu").view(1, -1, *[3] * spatial)
    wanted = F.batch_norm(input, zeros, ones, ones, zeros, eps=module.eps)
    try:
        with torch.no_grad():
            return torch.equal(plain.forward(inner, input), wanted)
    except Exception:  # it is the user's code; what fails here, does something else
        return False


def puts_back(module: nn.Module) -> bool:
    """Whether a module puts channels back already: a slim model's."""
    return isinstance(module, PutBack)


def can_put_back(module: nn.Module) -> bool:
    """Whether a module has a put-back form."""
    return put_back_type(module) is not None


def can_be_silent(module: nn.Module) -> bool:
    """Whether a module has a form that works without channels."""
    return plain_type(module) in SILENT and not isinstance(getattr(module, "padding", None), str)


# --- SyncBatchNorm


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Make every BatchNorm of a model a SyncBatchNorm, in place.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes new, plain ones: without the gates of
    `add_gates`, and without the places where a slim model's norms put their channels back.

    Args:
        model: any model, slim or not.
        process_group: over whose processes statistics are taken; all, by default.

    Returns:
        `model`; its normalizations are the objects they were, of another class.

    Raises:
        ArgumentError: a normalization of a class derived from torch's; nothing was changed.
    """
    tables = [{norm: norm for norm in NORMS}, PUT_BACK, SILENT]
    tables.append({norm: gated for norm in NORMS if (gated := gated_type(norm)) is not None})
    synchronized = {table[norm]: table[nn.SyncBatchNorm] for table in tables for norm in NORMS}
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
    }
    for name, module in found.items():
        if type(module) not in synchronized:
            raise ArgumentError(
                f"{name} is a {type(module).__name__}, which has no synchronized form here: "
                "replace it by one of torch's BatchNorms or convert it yourself"
            )
    for module in found.values():
        module.process_group = process_group
        module.__class__ = synchronized[type(module)]
    return model
