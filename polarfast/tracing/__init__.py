"""Which channels of a model are the same channel, found by one dry run."""

from ..inputs import call_model, plain_eager, tensors_of
from .dryrun import trace
from .graph import PIN, Addition, Graph, Match, NormCall, Pin, ProjectionCall, components
from .projections import convolution_shape

__all__ = [
    "PIN",
    "Addition",
    "Graph",
    "Match",
    "NormCall",
    "Pin",
    "ProjectionCall",
    "call_model",
    "components",
    "convolution_shape",
    "plain_eager",
    "tensors_of",
    "trace",
]
