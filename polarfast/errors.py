"""Every error polarfast raises on purpose. A message says what is wrong, where, and what to do."""


class PolarfastError(Exception):
    """Base class of all errors raised by polarfast."""


class ArgumentError(PolarfastError, ValueError):
    """An argument has a value that cannot be used; the message names the argument."""


class TracingError(PolarfastError):
    """The model cannot be traced (scripted, no normalization layer, modules that never ran)."""


class ScalingFactorError(PolarfastError):
    """A scaling factor cannot be used: its dtype, device, layout, or not in the optimizer."""


class StepError(PolarfastError, RuntimeError):
    """A training step was asked for at a moment when it cannot be taken, e.g. before backward."""


class RunError(PolarfastError, RuntimeError):
    """A run that cannot go on: its loss is no longer finite, or a process that reads images
    died.
    """


class ThresholdError(PolarfastError, ValueError):
    """Scaling factors for which no threshold can be chosen: NaN, infinite, or negative."""


class PlanError(PolarfastError, ValueError):
    """A plan that does not fit the model it is applied to, or cannot be read."""


class SearchError(PolarfastError, RuntimeError):
    """A search for λ and t that cannot end well; the message lists its trials."""


class VerificationError(PolarfastError):
    """The slim model does not equal what the plan says it equals."""


class FileFormatError(PolarfastError):
    """A file that is not a polarfast model file, is damaged, or is of a newer version."""


class BuildError(PolarfastError):
    """Part of the installation that is needed here is missing (compiled extension, Triton, an
    extra).
    """
