"""Channel gather in plain torch."""

from torch import Tensor


def gather_channels_ref(
    weight: Tensor, out_index: Tensor | None, in_index: Tensor | None
) -> Tensor:
    """weight[out_index][:, in_index]; an index that is None keeps all channels."""
    if out_index is not None:
        weight = weight.index_select(0, out_index)
    if in_index is not None:
        weight = weight.index_select(1, in_index)
    return weight
