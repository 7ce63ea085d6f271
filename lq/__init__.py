"""Lightning Quantization: a float PyTorch Lightning image classifier to INT8, with one callback."""

from typing import TYPE_CHECKING, Any

from lq.analysis import Advice, Analysis, LayerAnalysis, analyze
from lq.calibration import (
    CalibrationError,
    CalibratorComparison,
    RangeTable,
    calibrate,
    compare_calibrators,
    load_statistics,
    ranges,
    recalibrate,
    save_statistics,
)
from lq.convert import convert
from lq.export import CompilerError, ExportMismatchError, ExportResult, Verification, export
from lq.fold import FoldError, fold_batch_norm
from lq.graph.capture import CaptureError
from lq.graph.registry import register_layer
from lq.int8 import Int8Module
from lq.overrides import LayerSpec
from lq.prepare import NothingToQuantizeError, freeze, prepare, quantizers, unprepare
from lq.quantizer import Quantizer, QuantizerState
from lq.report import QuantizationReport, report
from lq.runtime.benchmark import Benchmark, benchmark
from lq.runtime.inference import InferenceModel, MissingRuntimeError
from lq.runtime.load import load
from lq.spec import QuantSpec
from lq.targets import TARGETS, Target

if TYPE_CHECKING:
    from lq.callback.callback import QuantizationCallback
    from lq.callback.quantize_checkpoint import quantize_checkpoint
    from lq.callback.result import QuantizationResult

__all__ = [
    "TARGETS",
    "Advice",
    "Analysis",
    "Benchmark",
    "CalibrationError",
    "CalibratorComparison",
    "CaptureError",
    "CompilerError",
    "ExportMismatchError",
    "ExportResult",
    "FoldError",
    "InferenceModel",
    "Int8Module",
    "LayerAnalysis",
    "LayerSpec",
    "MissingRuntimeError",
    "NothingToQuantizeError",
    "QuantSpec",
    "QuantizationCallback",
    "QuantizationReport",
    "QuantizationResult",
    "Quantizer",
    "QuantizerState",
    "RangeTable",
    "Target",
    "Verification",
    "analyze",
    "benchmark",
    "calibrate",
    "compare_calibrators",
    "convert",
    "export",
    "fold_batch_norm",
    "freeze",
    "load",
    "load_statistics",
    "prepare",
    "quantize_checkpoint",
    "quantizers",
    "ranges",
    "recalibrate",
    "register_layer",
    "report",
    "save_statistics",
    "unprepare",
]


def __getattr__(name: str) -> Any:
    """What needs Lightning is imported when it is asked for: a process that only runs a model need not wait for it."""
    if name in ("QuantizationCallback", "QuantizationResult", "quantize_checkpoint"):
        from lq import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
