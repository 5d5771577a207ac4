"""The networks of a run: as training starts from them, as it left them, and slim; and what the
recipe makes of their scaling factors: a regularizer, a prediction, a plan.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import polarfast as pf

from ..errors import ArgumentError
from ..planning.costs import whole_steps
from . import scores
from .data.source import DataSource
from .folder import Artifacts
from .models import build, load_weights
from .recipe import Pruning, Recipe
from .seeds import seed_at


class Networks:
    """Builds, reads and plans a run's networks, all on one device.

    Args:
        recipe: which network, and what becomes of its scaling factors.
        data: its images' channels, number of classes, and an example.
        files: where a run writes them.
    """

    def __init__(
        self, recipe: Recipe, data: DataSource, files: Artifacts, device: torch.device
    ) -> None:
        self.recipe, self.data, self.files, self.device = recipe, data, files, device

    @cached_property
    def latency(self) -> pf.LatencyTable | None:
        """The table that a share of the time goes by."""
        path = self.recipe.pruning.latency
        return pf.LatencyTable.load(path) if path else None

    @property
    def example(self) -> Tensor:
        """Test images to trace with and to count the MACs of: one, or as many as latency was
        measured with.
        """
        if self.latency is None:
            return self.data.example()
        shape = self.latency.inputs.get("shape", [0])
        if shape[1:] != list(self.data.image_shape):
            raise ArgumentError(
                f"pruning.latency: '{self.recipe.pruning.latency}' is not of images like these, "
                f"{self.data.image_shape}: polarfast latency RECIPE measures them"
            )
        return self.data.example(shape[0])

    def build(self) -> nn.Module:
        """The dense network, without gates, with freshly drawn weights, on the CPU."""
        return build(self.recipe.model, self.data.classes, self.data.image_shape[0])

    def fresh(self) -> tuple[nn.Module, pf.ScalingFactors]:
        """The network as training starts from it; the same weights in every process."""
        torch.manual_seed(self.recipe.seed)
        model = self.build()
        if self.recipe.weights:
            load_weights(model, self.recipe.weights)
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
        return pf.slim(model, self.plan(model, self.scales(model), Pruning(method="none")))

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
        return pf.ScalingFactors(
            gates,
            pinned=gates.pinned,
            pinned_macs=gates.pinned_macs,
            others=others,
            residual=gates.residual,
        )

    def regularizer(
        self, model: nn.Module, scales: pf.ScalingFactors, steps: int
    ) -> pf.Regularizer | None:
        """What the recipe's ``sparsity`` asks for; None for "none".

        Args:
            scales: all that are pruned. steps: optimizer steps of the stage.
        """
        sparsity = self.recipe.sparsity
        lam, upper, clamp = sparsity.lam, sparsity.upper, sparsity.clamp
        if sparsity.regularizer == "l1":
            return pf.L1(lam, upper=upper, clamp=clamp)
        if sparsity.regularizer == "deephoyer":
            return pf.DeepHoyer(lam, upper=upper, clamp=clamp)
        if sparsity.regularizer == "polarization":
            return pf.Polarization(lam, sparsity.t, upper=upper, mean=sparsity.mean, clamp=clamp)
        if sparsity.regularizer == "flops-target":
            assert sparsity.cut is not None and upper is not None  # Sparsity checks
            return pf.FlopsTarget(
                model,
                self.example,
                scales,
                cut=sparsity.cut,
                upper=upper,
                clamp=clamp,
                steps=steps,
                **self._cost(self.recipe.pruning),
                **_limits(self.recipe.pruning),
            )
        return None

    def predictor(self, model: nn.Module, scales: pf.ScalingFactors) -> pf.CutPredictor:
        """Predicts the share of the MACs cut while training goes on.

        Where the share is set beforehand (``pruning.cut``), it is what γ below 0.01 would save.
        """
        pruning = self.recipe.pruning
        settled = pruning.cut is not None or pruning.method == "none"
        method, value = ("fixed", None) if settled else (pruning.method, pruning.value)
        limits = self._whole_steps(pruning)
        return pf.CutPredictor(model, self.example, scales, method, value=value, **limits)

    def plan(
        self, model: nn.Module, scales: pf.ScalingFactors, pruning: Pruning | None = None
    ) -> pf.PruningPlan:
        """The plan of a network as it is now.

        Args:
            pruning: in place of the recipe's.

        Raises:
            PlanError: ``pruning.cut`` is out of reach; the message says what can be cut.
        """
        pruning = pruning or self.recipe.pruning
        limits = {**self._cost(pruning), **_limits(pruning)}
        if pruning.method == "none":
            return pf.plan(model, self.example, scales, "percentile", value=0.0, **limits)
        if pruning.cut is not None:
            compared = self._scores(model, scales, pruning.method)
            return pf.plan(model, self.example, scales, cut=pruning.cut, scores=compared, **limits)
        return pf.plan(model, self.example, scales, pruning.method, value=pruning.value, **limits)

    def at_zero(self, model: nn.Module, scales: pf.ScalingFactors) -> pf.CutPredictor:
        """Predicts the share of the MACs that channels with γ = 0 take."""
        limits = self._whole_steps(self.recipe.pruning)
        return pf.CutPredictor(model, self.example, scales, "fixed", value=0.0, **limits)

    def plan_at_zero(
        self, model: nn.Module, scales: pf.ScalingFactors, scores: dict[str, Tensor]
    ) -> pf.PruningPlan:
        """A plan that removes the channels whose scores are 0, as far as the recipe's limits let
        it.
        """
        limits = self._whole_steps(self.recipe.pruning)
        return pf.plan(model, self.example, scales, "fixed", value=0.0, scores=scores, **limits)

    def check_reach(self, model: nn.Module, scales: pf.ScalingFactors) -> None:
        """Raise PlanError if the recipe's ``pruning.cut`` is out of reach, or its latency table of
        another network, before any training.
        """
        pruning = self.recipe.pruning
        if pruning.cut is None and self.latency is None:
            return
        compared = self._scores(model, scales, pruning.method)
        table, limits = self.latency, _limits(pruning)
        found = pf.reachable(model, self.example, scales, scores=compared, latency=table, **limits)
        largest = getattr(found, pruning.of)[1]
        if pruning.cut is not None and pruning.cut > largest:
            raise found.refusal(pruning.cut, pruning.of)

    def _cost(self, pruning: Pruning) -> dict[str, Any]:
        """What a share to cut is a share of."""
        table = self.latency if pruning.of == "latency" else None
        return {"of": pruning.of, "latency": table}

    def _whole_steps(self, pruning: Pruning) -> dict[str, Any]:
        """The limits, with the steps that a latency table has: for what counts MACs."""
        limits = _limits(pruning)
        if self.latency is not None:
            limits["round_to"] = whole_steps(pruning.round_to, self.latency)
        return limits

    def _scores(
        self, model: nn.Module, scales: pf.ScalingFactors, method: str
    ) -> dict[str, Tensor] | None:
        """What is compared in place of |γ|; None: γ decide."""
        seed = seed_at(self.recipe.seed, len(scales))
        if method == "relative":
            return scores.relative(scales)
        if method == "uniform":
            return scores.in_order(scales)
        if method == "random":
            return scores.drawn(scales, seed)
        if method == "taylor":
            return scores.taylor(model, scales, self.data, self.recipe.batch_size, seed)
        return None

    def _gated(self, model: nn.Module) -> nn.Module:
        sparsity = self.recipe.sparsity
        if sparsity.gates:
            pf.add_gates(model, self.example, where=sparsity.gates, residual=sparsity.residual)
        return model


def _limits(pruning: Pruning) -> dict[str, Any]:
    """What plans, predictions and steering have in common."""
    return {name: getattr(pruning, name) for name in ("fold", "round_to", "min_channels")}
