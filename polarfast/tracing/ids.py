"""Channel ids: which channel each element of an activation belongs to.

An activation's ids are an int64 CPU tensor of the activation's shape. They almost always vary along
one dimension only, so they are kept as expanded (stride 0) views and cost a few hundred bytes;
`compact` drops the repeated dimensions again.
"""

import torch
from torch import Tensor

#: The id of an element whose position cannot be removed: network inputs, padding, results of
#: unknown operators.
PIN = 0


def compact(ids: Tensor) -> Tensor:
    """`ids` with every repeated (stride 0) dimension narrowed to length 1."""
    for dim, stride in enumerate(ids.stride()):
        if stride == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def varying_dims(ids: Tensor) -> set[int]:
    """The dimensions along which `ids` really differ."""
    small = compact(ids)
    return {
        dim
        for dim, size in enumerate(small.shape)
        if size > 1 and bool((small != small.narrow(dim, 0, 1)).any())
    }


def along(ids: Tensor, dim: int) -> Tensor | None:
    """Ids per index of `dim`, shape [ids.shape[dim]]; None where they also vary along another
    dimension.
    """
    size = ids.shape[dim]
    if varying_dims(ids) - {dim}:
        return None
    line = compact(ids)
    for other in range(line.dim()):
        if other != dim:
            line = line.narrow(other, 0, 1)
    return line.reshape(-1).expand(size) if line.numel() == 1 else line.reshape(size)


def components(count: int, edges: Tensor) -> Tensor:
    """Labels of the connected components of a graph on `count` ids.

    Args:
        count: number of ids.
        edges: int64 [2, E].

    Returns:
        int64 [count]: the smallest id of each id's component (so everything joined to PIN gets
        label PIN).
    """
    label = torch.arange(count, device="cpu")
    while True:
        left, right = label[edges[0]], label[edges[1]]
        if torch.equal(left, right):
            return label
        # Hang the larger root under the smaller one, then point every id straight at its root.
        label = label.scatter_reduce(
            0, torch.maximum(left, right), torch.minimum(left, right), "amin"
        )
        while not torch.equal(shorter := label[label], label):
            label = shorter
