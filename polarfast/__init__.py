"""polarfast: polarization pruning of convolutional networks while they train.

Zhuang et al., "Neuron-level Structured Pruning using Polarization Regularizer", NeurIPS 2020.
"""

from .aiming import Reach
from .errors import (
    ArgumentError,
    BuildError,
    FileFormatError,
    PlanError,
    PolarfastError,
    ScalingFactorError,
    SearchError,
    StepError,
    ThresholdError,
    TracingError,
    VerificationError,
)
from .files import load, load_plan, save
from .gating import add_gates
from .planning import plan, reachable
from .plans import PruningPlan
from .prediction import CutPredictor
from .recalibration import recalibrate
from .regularizers import L1, DeepHoyer, Polarization, Regularizer
from .scaling import ScalingFactors, init_scales, scaling_factors
from .searching import SearchResult, Stability, Trial, search
from .slimming import slim
from .stepping import attach, step
from .targeting import FlopsTarget
from .thresholding import thresholds
from .verification import Report, verify

__version__ = "0.1.0"

__all__ = [
    "L1",
    "ArgumentError",
    "BuildError",
    "CutPredictor",
    "DeepHoyer",
    "FileFormatError",
    "FlopsTarget",
    "PlanError",
    "PolarfastError",
    "Polarization",
    "PruningPlan",
    "Reach",
    "Regularizer",
    "Report",
    "ScalingFactorError",
    "ScalingFactors",
    "SearchError",
    "SearchResult",
    "Stability",
    "StepError",
    "ThresholdError",
    "TracingError",
    "Trial",
    "VerificationError",
    "add_gates",
    "attach",
    "init_scales",
    "load",
    "load_plan",
    "plan",
    "reachable",
    "recalibrate",
    "save",
    "scaling_factors",
    "search",
    "slim",
    "step",
    "thresholds",
    "verify",
]
