"""Put-back: kept channels at their places among constants, in one pass, as dispatcher ops."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .gather import gather_channels
from .registration import check_index, check_tensors, register

_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def put_back(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """A tensor with constant[c] everywhere, but for the channels `index`, which are `kept`'s.

    One pass on the CPU; torch's own operators on other devices, where they are no slower, and
    wherever something else than a plain tensor comes in (compilers, exporters, function
    transforms).

    Args:
        kept: [N, K, *], any memory format.
        index: int64 [K], the place of each kept channel; no place twice.
        constant: [C].

    Returns:
        [N, C, *], in the dtype and memory format of `kept`; differentiable in `kept`.

    Raises:
        RuntimeError: they are not all on one device.
    """
    if not kept.device == index.device == constant.device:  # torch's own writes pass over "meta"
        check_tensors(kept=kept, index=index, constant=constant)
    if torch.compiler.is_compiling() or in_transform() or torch.jit.is_tracing():
        return put_back_by_reading(kept, index, constant)  # asks no tensor for its memory format
    graph = torch.is_grad_enabled() and kept.requires_grad
    # With a graph to write, torch's own operators are no slower, but for channels_last.
    if takes_kernel(kept) and not (graph and kept.is_contiguous()):
        return torch.ops.polarfast.put_back(kept, index, constant)
    return put_back_ref(kept, index, constant)


def put_back_norm(
    input: Tensor,
    index: Tensor,
    constant: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """`put_back` of a batch norm in eval mode, in the same pass. Not differentiable.

    Args:
        input: [N, K, *], one that `takes_kernel`.
        index, constant: as for `put_back`.
        weight, bias, mean, var, eps: the norm's, each [K].
    """
    return torch.ops.polarfast.put_back_norm(input, index, constant, weight, bias, mean, var, eps)


def put_back_ref(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """`put_back` in torch's own operators, written from the input's side."""
    full = _shape(kept, index, constant).copy_(constant.view(1, -1, *[1] * (kept.dim() - 2)))
    return full.index_copy_(1, index, kept)


def put_back_by_reading(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """The same, said from the output's side: where does this element come from?

    A compiler can make it one loop with the normalization before and the addition behind; a write
    to computed places (`index_copy`) ends a loop.
    """
    width = constant.numel()
    order = torch.arange(index.numel(), device=index.device)
    nowhere = torch.full((width,), -1, dtype=torch.long, device=index.device)
    source = nowhere.scatter(0, index, order)
    ones = [1] * (kept.dim() - 2)
    other = constant.to(kept.dtype).view(1, width, *ones)
    read = kept.index_select(1, source.clamp(min=0))
    return torch.where((source >= 0).view(1, width, *ones), read, other)


def takes_kernel(input: Tensor) -> bool:
    """Whether the CPU kernels can work on this tensor, and nobody looks on who wants torch's own
    operators.
    """
    return (
        type(input) is Tensor
        and input.is_cpu
        and input.dtype in _DTYPES
        and not torch.jit.is_tracing()
        and not in_transform()
        and _get_current_dispatch_mode() is None
        and (input.is_contiguous() or _is_channels_last(input))
    )


def in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation follows what is computed."""
    level = torch._C._functorch.maybe_current_level()
    return level is not None or torch.autograd.forward_ad._current_level >= 0


def _is_channels_last(tensor: Tensor) -> bool:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return memory_format is not None and tensor.is_contiguous(memory_format=memory_format)


def _check(kept: Tensor, index: Tensor, constant: Tensor, **norm: Tensor | None) -> None:
    check_tensors(("bias",), kept=kept, index=index, constant=constant, **norm)
    check_index("index", index)
    if kept.dim() < 2 or constant.dim() != 1:
        raise RuntimeError(
            f"polarfast: kept must be [samples, channels, ...] and constant [channels], not "
            f"{kept.dim()}-D and {constant.dim()}-D"
        )
    channels = kept.shape[1]
    torch._check(
        index.shape[0] == channels,
        lambda: f"polarfast: index has {index.shape[0]} places for {channels} channels",
    )
    for name, tensor in {"kept": kept, "constant": constant, **norm}.items():
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            raise RuntimeError(
                f"polarfast: {name} must be float32, float16, bfloat16 or float64, not "
                f"{tensor.dtype}"
            )
        if name in norm and (tensor.dim() != 1 or tensor.shape[0] != channels):
            raise RuntimeError(f"polarfast: {name} must be [{channels}], not {list(tensor.shape)}")


def _shape(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    sizes = (kept.shape[0], constant.shape[0], *kept.shape[2:])
    if kept.is_contiguous() or not _is_channels_last(kept):
        return kept.new_empty(sizes)
    rest = kept.new_empty((sizes[0], *sizes[2:], sizes[1]))
    return rest.movedim(-1, 1)


def _put_back_shape(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    _check(kept, index, constant)
    return _shape(kept, index, constant)


def _put_back_elsewhere(kept: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    _check(kept, index, constant)
    return put_back_ref(kept, index, constant)


def _check_norm(input: Tensor, index: Tensor, constant: Tensor, *norm: Any) -> None:
    weight, bias, mean, var, eps = norm
    _check(input, index, constant, weight=weight, bias=bias, mean=mean, var=var)
    if not eps >= 0:
        raise RuntimeError(f"polarfast: eps must be 0 or more, not {eps}")


def _norm_shape(input: Tensor, index: Tensor, constant: Tensor, *norm: Any) -> Tensor:
    _check_norm(input, index, constant, *norm)
    return _shape(input, index, constant)


def _norm_elsewhere(
    input: Tensor,
    index: Tensor,
    constant: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    _check_norm(input, index, constant, weight, bias, mean, var, eps)
    kept = F.batch_norm(input, mean, var, weight, bias, eps=eps)
    return put_back_ref(kept, index, constant)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    if torch.is_grad_enabled() or grad.is_contiguous() or not _is_channels_last(grad):
        return grad.index_select(1, index), None, None  # differentiable in its turn
    return gather_channels(grad, None, index), None, None  # where torch goes element by element


register("put_back", fake=_put_back_shape, elsewhere=_put_back_elsewhere)
register("put_back_norm", fake=_norm_shape, elsewhere=_norm_elsewhere)
torch.library.register_autograd("polarfast::put_back", _backward, setup_context=_setup)
