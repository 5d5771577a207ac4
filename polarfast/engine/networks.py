"""The networks of a run: as training starts from them, as it left them, and slim."""

import torch
from torch import Tensor, nn

import polarfast as pf
from polarfast.engine import models, pruning
from polarfast.engine.artifacts import Artifacts
from polarfast.engine.data import DataSource
from polarfast.engine.recipe import Recipe


class Networks:
    """Builds and reads a run's networks, all on one device.

    Args:
        recipe: which network, and what becomes of its scaling factors.
        data: its images' channels, number of classes, and an example.
        files: where a run writes them.
    """

    def __init__(
        self, recipe: Recipe, data: DataSource, files: Artifacts, device: torch.device
    ) -> None:
        self.recipe, self.data, self.files, self.device = recipe, data, files, device

    @property
    def example(self) -> Tensor:
        """One test image, to trace with and to count the MACs of."""
        return self.data.example()

    def build(self) -> nn.Module:
        """The dense network, without gates, with freshly drawn weights, on the CPU."""
        return models.build(self.recipe.model, self.data.classes, self.data.image_shape[0])

    def fresh(self) -> tuple[nn.Module, pf.ScalingFactors]:
        """The network as training starts from it; the same weights in every process."""
        torch.manual_seed(self.recipe.seed)
        model = self.build()
        if self.recipe.weights:
            models.load_weights(model, self.recipe.weights)
        model = self._gated(model.to(self.device))
        scales = self.scales(model)
        if self.recipe.sparsity.init is not None:
            pf.init_scales(scales, self.recipe.sparsity.init)
        return model, scales

    def dense(self) -> nn.Module:
        """The dense network as training left it, with its gates if it has any."""
        model = self._gated(self.build().to(self.device))
        model.load_state_dict(self.files.read("dense", self.device))
        return model

    def plain_dense(self) -> nn.Module:
        """The dense network as training left it, its gates folded away."""
        model = self.dense().eval()
        if not self.recipe.sparsity.gates:
            return model
        scales, everything = self.scales(model), pruning.KEEP_EVERYTHING
        plan = pruning.make_plan(model, self.example, scales, everything, self.recipe.seed)
        return pf.slim(model, plan)

    def slim(self, name: str = "slim") -> nn.Module:
        """The slim network: fine-tuned, or as it was right after pruning ("pruned")."""
        return pf.load(self.files.path(name), build=self.build).to(self.device)

    def scales(self, model: nn.Module) -> pf.ScalingFactors:
        """The scaling factors of a dense network that may be pruned; its gates, if it has any."""
        sparsity = self.recipe.sparsity
        scales = pf.scaling_factors(model, self.example, residual=sparsity.residual)
        if not sparsity.gates:
            return scales
        gates = scales.select(r"\.gate$")
        # The γ of layers without a gate are no gates: clamp="all" must leave them alone.
        others = {name: gate for name, gate in gates.others.items() if name.endswith(".gate")}
        return pf.ScalingFactors(gates, pinned=gates.pinned, others=others, residual=gates.residual)

    def _gated(self, model: nn.Module) -> nn.Module:
        sparsity = self.recipe.sparsity
        if sparsity.gates:
            pf.add_gates(model, self.example, where=sparsity.gates, residual=sparsity.residual)
        return model
