"""Channel gather: the one operation that makes a weight smaller, as a dispatcher op."""

import torch
from torch import Tensor

from .registration import check_index, check_tensors, refuse_backward, register


def gather_channels(
    weight: Tensor, out_index: Tensor | None = None, in_index: Tensor | None = None
) -> Tensor:
    """weight[out_index][:, in_index] in one pass.

    Args:
        weight: 1-D to 5-D, any dtype and device. Dimension 0 is called out, dimension 1 in,
            whatever they mean to the layer (transposed convolutions have them the other way round).
        out_index, in_index: 1-D int64, in range, not negative; None keeps all channels.

    Returns:
        A new tensor; channels_last if `weight` is, else contiguous. Not differentiable.

    Raises:
        RuntimeError: an index is out of range, nothing has been read by then; or backward.
    """
    indices = [None if i is None else i.to(weight.device) for i in (out_index, in_index)]
    return torch.ops.polarfast.gather_channels(weight, *indices)


def gather_channels_ref(
    weight: Tensor, out_index: Tensor | None, in_index: Tensor | None
) -> Tensor:
    """`gather_channels` in plain torch; indices are not checked."""
    if out_index is not None:
        weight = weight.index_select(0, out_index)
    if in_index is not None:
        weight = weight.index_select(1, in_index)
    return weight


def _channels_last_order(dim: int) -> list[int]:
    return [0, *range(2, dim), 1]


def _is_channels_last(weight: Tensor) -> bool:
    """By its strides alone: a 1×1 convolution's weight may pass for both, and is one of them."""
    if weight.dim() not in (4, 5):
        return False
    return weight.stride() == _strides(weight.shape, _channels_last_order(weight.dim()))


def _strides(sizes: torch.Size, order: list[int]) -> tuple[int, ...]:
    strides, stride = [0] * len(sizes), 1
    for d in reversed(order):
        strides[d] = stride
        stride *= max(sizes[d], 1)
    return tuple(strides)


def _check(weight: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> None:
    optional = ("out_index", "in_index")
    check_tensors(optional, weight=weight, out_index=out_index, in_index=in_index)
    if not 1 <= weight.dim() <= 5:
        raise RuntimeError(
            f"polarfast: a weight of 1 to 5 dimensions is expected, not of {weight.dim()}"
        )
    if weight.dim() == 1 and in_index is not None:
        raise RuntimeError("polarfast: a 1-D weight has no input channels to select")
    for name, index in (("out_index", out_index), ("in_index", in_index)):
        if index is not None:
            check_index(name, index)


def _shape(weight: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
    _check(weight, out_index, in_index)
    sizes = list(weight.shape)
    if out_index is not None:
        sizes[0] = out_index.shape[0]
    if in_index is not None:
        sizes[1] = in_index.shape[0]
    dim = weight.dim()
    order = _channels_last_order(dim) if _is_channels_last(weight) else list(range(dim))
    return weight.new_empty_strided(sizes, _strides(torch.Size(sizes), order))


def _gather_elsewhere(weight: Tensor, out_index: Tensor | None, in_index: Tensor | None) -> Tensor:
    """On a GPU: checked first, since an index out of range there ends the whole process."""
    _check(weight, out_index, in_index)
    for d, name, index in ((0, "out_index", out_index), (1, "in_index", in_index)):
        if index is None or index.numel() == 0:
            continue
        if bool(((index < 0) | (index >= weight.shape[d])).any()):
            raise RuntimeError(
                f"polarfast: {name} goes outside the weight's {weight.shape[d]} channels"
            )
    found = gather_channels_ref(weight, out_index, in_index)
    shape = _shape(weight, out_index, in_index)
    return found if found.stride() == shape.stride() else shape.copy_(found)


register("gather_channels", fake=_shape, elsewhere=_gather_elsewhere)
refuse_backward("gather_channels")
