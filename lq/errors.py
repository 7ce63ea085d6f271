"""Every exception that lq raises and nobody else does."""

from __future__ import annotations


class CalibrationError(ValueError):
    """The calibration data give no usable ranges."""


class CaptureError(RuntimeError):
    """The model cannot be captured as a graph; the message names the module and the reason."""


class CompilerError(RuntimeError):
    """AOTInductor could not compile the network."""


class ConfigError(ValueError):
    """What the user gave is not a valid config. The message is one line and says what to change."""


class ContenderError(RuntimeError):
    """A contender failed in its process; the message has its traceback."""


class DatasetNotFoundError(FileNotFoundError):
    """A data set is not in the given place, and could not be downloaded if that was asked for."""


class ExportMismatchError(RuntimeError):
    """An exported file does not compute what the network does."""


class UnsuitableError(ValueError):
    """An engine is known to compute a network wrongly."""


class FoldError(ValueError):
    """Folding batch norm would change what the model computes."""


class GuardError(ValueError):
    """The text is not a guard."""


class MissingRuntimeError(ImportError):
    """The package of an optional runtime is not installed; the message names the extra."""


class NothingToQuantizeError(ValueError):
    """The model has no layer that could run in INT8."""
