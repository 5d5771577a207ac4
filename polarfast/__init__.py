"""polarfast: polarization pruning of convolutional networks while they train.

Zhuang et al., "Neuron-level Structured Pruning using Polarization Regularizer", NeurIPS 2020.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ArgumentError as ArgumentError
    from .errors import BuildError as BuildError
    from .errors import FileFormatError as FileFormatError
    from .errors import PlanError as PlanError
    from .errors import PolarfastError as PolarfastError
    from .errors import RunError as RunError
    from .errors import ScalingFactorError as ScalingFactorError
    from .errors import SearchError as SearchError
    from .errors import StepError as StepError
    from .errors import ThresholdError as ThresholdError
    from .errors import TracingError as TracingError
    from .errors import VerificationError as VerificationError
    from .latency.table import LatencyTable as LatencyTable
    from .layers import convert_sync_batchnorm as convert_sync_batchnorm
    from .planning.plan import mac_weights as mac_weights
    from .planning.plan import plan as plan
    from .planning.plan import reachable as reachable
    from .planning.prediction import CutPredictor as CutPredictor
    from .planning.pruning_plan import PruningPlan as PruningPlan
    from .planning.share import Reach as Reach
    from .planning.thresholds import thresholds as thresholds
    from .recalibration import recalibrate as recalibrate
    from .saving import load as load
    from .saving import load_plan as load_plan
    from .saving import save as save
    from .scaling.factors import ScalingFactors as ScalingFactors
    from .scaling.factors import init_scales as init_scales
    from .scaling.factors import scaling_factors as scaling_factors
    from .scaling.gating import add_gates as add_gates
    from .slimming.fuse import fuse as fuse
    from .slimming.shrink import shrink as shrink
    from .slimming.slim import slim as slim
    from .slimming.verify import Report as Report
    from .slimming.verify import verify as verify
    from .steering.flops_target import FlopsTarget as FlopsTarget
    from .steering.search import SearchResult as SearchResult
    from .steering.search import Stability as Stability
    from .steering.search import Trial as Trial
    from .steering.search import search as search
    from .stepping.regularizers import L1 as L1
    from .stepping.regularizers import DeepHoyer as DeepHoyer
    from .stepping.regularizers import Polarization as Polarization
    from .stepping.regularizers import Regularizer as Regularizer
    from .stepping.step import attach as attach
    from .stepping.step import step as step
    from .stepping.strength import suggest_lam as suggest_lam

__version__ = "0.1.0"

#: Module -> the public names that it defines. Loaded when they are asked for: the command line's
#: help, or a network that only needs its layers, need not wait for the rest.
_PUBLIC = {
    "errors": "ArgumentError BuildError FileFormatError PlanError PolarfastError RunError "
    "ScalingFactorError SearchError StepError ThresholdError TracingError VerificationError",
    "latency.table": "LatencyTable",
    "layers": "convert_sync_batchnorm",
    "planning.plan": "mac_weights plan reachable",
    "planning.prediction": "CutPredictor",
    "planning.pruning_plan": "PruningPlan",
    "planning.share": "Reach",
    "planning.thresholds": "thresholds",
    "recalibration": "recalibrate",
    "saving": "load load_plan save",
    "scaling.factors": "ScalingFactors init_scales scaling_factors",
    "scaling.gating": "add_gates",
    "slimming.fuse": "fuse",
    "slimming.shrink": "shrink",
    "slimming.slim": "slim",
    "slimming.verify": "Report verify",
    "steering.flops_target": "FlopsTarget",
    "steering.search": "SearchResult Stability Trial search",
    "stepping.regularizers": "DeepHoyer L1 Polarization Regularizer",
    "stepping.step": "attach step",
    "stepping.strength": "suggest_lam",
}
_DEFINED_IN = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_DEFINED_IN)


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'polarfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_DEFINED_IN[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFINED_IN})


if "torch" in sys.modules:
    # Who has torch and us finds our operators in torch.ops.polarfast; the command line's help needs
    # neither, and is quick.
    importlib.import_module(".kernels", __name__)
