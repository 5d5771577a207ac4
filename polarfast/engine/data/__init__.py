"""Data sets: found on disk, split, decoded, augmented and handed out in reproducible batches."""

from .plan import EpochPlan
from .settings import Data
from .source import DataSource, load

__all__ = ["Data", "DataSource", "EpochPlan", "load"]
