"""Which positions of every tensor stay when some channels go, and what the slim model costs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .channels import Channels
from .gates import gate_name, gated_modules
from .kernels.gather import gather_channels
from .structure import ModuleChange, Structure
from .tracing import ProjectionCall


class Layout:
    """The slim model's sizes, given the channels that stay.

    Attributes:
        alive: bool [graph.count], the ids that stay (a constant channel stays).
    """

    def __init__(self, channels: Channels, alive: Tensor) -> None:
        self.channels, self.graph, self.alive = channels, channels.graph, alive
        self._index: dict[str, dict[int, Tensor]] = {}
        gates = self.graph.gate_names()  # no slim model has any
        lost = channels.axes.counts(~alive).tolist()
        for ((name, dim), ids), gone in zip(self.graph.axes.items(), lost, strict=True):
            if gone and name not in gates:
                kept = alive[ids].nonzero()[:, -1]
                # Groups keep as many positions each, but not the same ones.
                index = kept.view(len(ids), -1) if ids.dim() == 2 else kept
                self._index.setdefault(name, {})[dim] = index

    def index(self, name: str) -> dict[int, Tensor]:
        """Dimension -> positions kept, for the dimensions of a tensor that lose any; [groups, n]
        where each group of rows keeps others.
        """
        return self._index.get(name, {})

    def places(self, name: str, dim: int, mask: Tensor) -> Tensor:
        """A mask over a tensor's positions along a dimension ([groups, n] where each group of rows
        has its own), cut to those that stay.
        """
        index = self.index(name).get(dim)
        if index is None:
            return mask
        return mask.gather(1, index) if index.dim() == 2 else mask[index]

    def changed(self) -> list[str]:
        """Names of all tensors that lose positions."""
        return list(self._index)

    def shape(self, name: str, tensor: Tensor) -> list[int]:
        """The shape in the slim model of the tensor of that name."""
        shape = list(tensor.shape)
        for dim, kept in self.index(name).items():
            shape[dim] = kept.shape[-1]
        return shape

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """The kept positions of a tensor shaped like the one of that name."""
        index = self.index(name)
        if 1 in index and index[1].dim() == 2:
            blocks = tensor.chunk(len(index[1]))
            pairs = zip(blocks, index[1], strict=True)
            tensor = torch.cat([gather_channels(block, None, kept) for block, kept in pairs])
            index = {dim: kept for dim, kept in index.items() if dim != 1}
        if index.keys() & {0, 1}:
            tensor = gather_channels(tensor, index.get(0), index.get(1))
        for dim in index.keys() - {0, 1}:
            tensor = tensor.index_select(dim, index[dim].to(tensor.device))
        return tensor

    def _sizes(self, call: ProjectionCall) -> tuple[int, int]:
        return int(self.alive[call.inputs].sum()), int(self.alive[call.outputs].sum())

    def macs(self) -> int:
        """Multiply-accumulates of convolutions and linear layers on the example inputs."""
        counted = [call for call in self.graph.projections if call.counted]
        return sum(call.macs(*self._sizes(call)) for call in counted) + self.graph.fixed_macs

    def params(self, model: nn.Module, new_biases: Mapping[str, int]) -> int:
        """Number of parameters, created biases included, gates left out."""
        total = sum(new_biases.values())
        gates = {gate_name(name) for name, _ in gated_modules(model)}
        for name, param in model.named_parameters():
            if name in gates:
                continue
            total += torch.Size(self.shape(name, param)).numel()
        return total

    def structure(self, model: nn.Module, new_biases: Mapping[str, int]) -> Structure:
        """The slim model's shape, as data.

        Args:
            model: the original.
            new_biases: name -> length of the biases to create.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        structure = Structure()
        for name in self.changed():
            structure.shapes[name] = self.shape(name, tensors[name])
        for name, length in new_biases.items():
            structure.shapes[name] = [length]
            _change(structure, name).bias = True
        for call in self.graph.projections:
            self._projection(structure, model, call)
        for norm in self.graph.norms:
            norm_name = norm.weight or norm.mean or ""
            if norm_name in structure.shapes:
                boundary = norm.scale in self.channels.boundaries
                self._norm(structure, model, norm_name, boundary, norm.inputs)
        for name in structure.shapes:
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.PReLU):
                _change(structure, name).attributes["num_parameters"] = structure.shapes[name][0]
        return structure

    def _projection(self, structure: Structure, model: nn.Module, call: ProjectionCall) -> None:
        module = model.get_submodule(call.weight.rpartition(".")[0])
        n_in, n_out = self._sizes(call)
        if n_in == call.inputs.numel() and n_out == call.outputs.numel():
            return
        change = _change(structure, call.weight)
        change.silent = not (n_in and n_out)
        if isinstance(module, nn.modules.conv._ConvNd):
            change.attributes = {"in_channels": n_in, "out_channels": n_out}
            if call.depthwise:
                change.attributes["groups"] = n_in
        elif isinstance(module, nn.Linear):
            change.attributes = {"in_features": n_in, "out_features": n_out}

    def _norm(
        self, structure: Structure, model: nn.Module, name: str, boundary: bool, ids: Tensor
    ) -> None:
        module = model.get_submodule(name.rpartition(".")[0])
        change = _change(structure, name)
        kept = int(self.alive[ids].sum())
        if isinstance(module, nn.modules.batchnorm._NormBase):
            change.attributes = {"num_features": kept}
        if boundary:
            change.put_back = ids.numel()
            prefix = name.rpartition(".")[0]
            structure.shapes[f"{prefix}.put_back_index"] = [kept]
            structure.shapes[f"{prefix}.put_back_constant"] = [ids.numel()]
        else:
            change.silent = kept == 0


def _change(structure: Structure, tensor_name: str) -> ModuleChange:
    return structure.modules.setdefault(tensor_name.rpartition(".")[0], ModuleChange())
