"""Which channels of a model are the same channel, found by one dry run."""

from .calling import call_model, plain_eager, tensors_of
from .calls import convolution_shape
from .dryrun import trace
from .graph import Addition, Graph, Match, NormCall, Pin, ProjectionCall
from .ids import PIN, components

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
