"""Which channels of a model are the same channel, found by one dry run."""

from .dryrun import call_model, trace
from .graph import Addition, Graph, NormCall, Pin, ProjectionCall
from .ids import PIN, components

__all__ = [
    "PIN",
    "Addition",
    "Graph",
    "NormCall",
    "Pin",
    "ProjectionCall",
    "call_model",
    "components",
    "trace",
]
