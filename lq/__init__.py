"""Lightning Quantization: a float PyTorch Lightning image classifier to INT8, with one callback."""

from lq.artifact import load, save
from lq.calibrate import CalibrationError, calibrate
from lq.callback import QuantizationCallback, QuantizationResult
from lq.convert import FoldError, convert
from lq.graph.tracing import CaptureError
from lq.int8 import Int8Module
from lq.prepare import NothingToQuantizeError, freeze, prepare, quantizers, unprepare
from lq.quantizer import Quantizer, QuantizerState
from lq.report import QuantizationReport, report
from lq.spec import QuantSpec
from lq.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "CalibrationError",
    "CaptureError",
    "FoldError",
    "Int8Module",
    "NothingToQuantizeError",
    "QuantSpec",
    "QuantizationCallback",
    "QuantizationReport",
    "QuantizationResult",
    "Quantizer",
    "QuantizerState",
    "Target",
    "calibrate",
    "convert",
    "freeze",
    "load",
    "prepare",
    "quantizers",
    "report",
    "save",
    "unprepare",
]
