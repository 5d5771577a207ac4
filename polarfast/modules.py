"""Modules of a slim network that plain torch has not: put-back normalizations, and layers without
channels.

Each is a mixin over the torch class it stands in for, so that `isinstance` and parameter names stay
as they were.
"""

from typing import cast

import torch
from torch import Tensor, nn

from .gates import plain_type
from .kernels.put_back import put_back, put_back_norm, takes_kernel


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


class PutBackMixin:
    """A normalization of the kept channels whose output has the full width again ("expand").

    Buffers:
        put_back_index: int64 [kept], the place of each kept channel in the output.
        put_back_constant: [width], what the removed channels are: their β, or 0 where β was
            dropped.
    """

    put_back_index: Tensor
    put_back_constant: Tensor

    def put_back(self, index: Tensor, constant: Tensor) -> None:
        """Register where the kept channels go and what stands in the other places."""
        assert isinstance(self, nn.Module)
        self.register_buffer("put_back_index", index)
        self.register_buffer("put_back_constant", constant)

    def forward(self, input: Tensor) -> Tensor:
        index, constant = self.put_back_index, self.put_back_constant
        if not index.numel():
            return self._constant(_nothing(self, input))
        assert isinstance(self, nn.modules.batchnorm._BatchNorm)
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
        return put_back(super().forward(input), index, constant)  # type: ignore[misc]

    def _constant(self, nothing: Tensor) -> Tensor:
        """The output of a normalization that kept no channel, from its input [N, 0, *]."""
        channels = self.put_back_constant.to(nothing.dtype) + nothing.sum()
        shape = (nothing.shape[0], channels.numel(), *nothing.shape[2:])
        # Memory of its own: networks add onto a branch in place.
        return channels.view(1, -1, *[1] * (nothing.dim() - 2)).expand(shape).contiguous()


class PutBackBatchNorm1d(PutBackMixin, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that puts its channels back at their places."""


class PutBackBatchNorm2d(PutBackMixin, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that puts its channels back at their places."""


class PutBackBatchNorm3d(PutBackMixin, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that puts its channels back at their places."""


class PutBackSyncBatchNorm(PutBackMixin, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` that puts its channels back at their places."""


class _SilentNormMixin:
    """A normalization of no channels (torch's own refuses them)."""

    def forward(self, input: Tensor) -> Tensor:
        return _nothing(self, input)


class SilentBatchNorm1d(_SilentNormMixin, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over no channels."""


class SilentBatchNorm2d(_SilentNormMixin, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over no channels."""


class SilentBatchNorm3d(_SilentNormMixin, nn.BatchNorm3d):
    """`nn.BatchNorm3d` over no channels."""


class SilentSyncBatchNorm(_SilentNormMixin, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` over no channels."""


class _SilentConvMixin:
    """A convolution without input or without output channels: no multiplication, the output's shape
    and the bias.
    """

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
        if not input.shape[1]:
            channels = channels + input.sum()
        shape = (input.shape[0], self.out_channels, *space)
        # Memory of its own: networks write into what a layer returns.
        return channels.to(input.dtype).view(1, -1, *[1] * len(space)).expand(shape).contiguous()


class SilentConv1d(_SilentConvMixin, nn.Conv1d):
    """`nn.Conv1d` without input or output channels."""


class SilentConv2d(_SilentConvMixin, nn.Conv2d):
    """`nn.Conv2d` without input or output channels."""


class SilentConv3d(_SilentConvMixin, nn.Conv3d):
    """`nn.Conv3d` without input or output channels."""


#: Torch class -> the class that puts channels back.
PUT_BACK: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: PutBackBatchNorm1d,
    nn.BatchNorm2d: PutBackBatchNorm2d,
    nn.BatchNorm3d: PutBackBatchNorm3d,
    nn.SyncBatchNorm: PutBackSyncBatchNorm,
}
#: Torch class -> the class that works without channels; nn.Linear itself does.
SILENT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SilentBatchNorm1d,
    nn.BatchNorm2d: SilentBatchNorm2d,
    nn.BatchNorm3d: SilentBatchNorm3d,
    nn.SyncBatchNorm: SilentSyncBatchNorm,
    nn.Conv1d: SilentConv1d,
    nn.Conv2d: SilentConv2d,
    nn.Conv3d: SilentConv3d,
    nn.Linear: nn.Linear,
}


def can_put_back(module: nn.Module) -> bool:
    """Whether a module has a put-back form."""
    return plain_type(module) in PUT_BACK


def can_be_silent(module: nn.Module) -> bool:
    """Whether a module has a form that works without channels."""
    return plain_type(module) in SILENT and not isinstance(getattr(module, "padding", None), str)
