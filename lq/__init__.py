"""Lightning Quantization: a float PyTorch Lightning image classifier to INT8, with one callback."""

from typing import TYPE_CHECKING, Any

from lq.analysis.analyze import analyze
from lq.deployment.export import ExportResult, export
from lq.deployment.load import load
from lq.deployment.verify import Verification
from lq.engines.base import InferenceModel
from lq.errors import (
    CalibrationError,
    CaptureError,
    CompilerError,
    ExportMismatchError,
    FoldError,
    MissingRuntimeError,
    NothingToQuantizeError,
)
from lq.graph.capture.registry import register_layer
from lq.int8.module import Int8Module
from lq.numerics.quantizer import Quantizer, QuantizerState
from lq.numerics.rounding import register_rounding
from lq.numerics.spec import QuantSpec
from lq.results.analysis import Advice, Analysis, LayerAnalysis
from lq.results.report import QuantizationReport
from lq.results.tuning import Tuning, TuningStep
from lq.schemes.overrides import LayerSpec
from lq.schemes.targets import TARGETS, Target
from lq.timing.benchmark import Benchmark, benchmark
from lq.tuning.bias_correction import correct_bias
from lq.tuning.equalization import equalize
from lq.tuning.learned_rounding import learn_rounding
from lq.tuning.quantize import Quantized, quantize
from lq.workflow.calibrate import calibrate
from lq.workflow.comparison import CalibratorComparison, compare_calibrators
from lq.workflow.convert import convert
from lq.workflow.fold import fold_batch_norm
from lq.workflow.prepare import freeze, prepare, quantizers, unprepare
from lq.workflow.ranges import RangeTable, ranges
from lq.workflow.recalibrate import recalibrate
from lq.workflow.reporting import report
from lq.workflow.statistics import load_statistics, save_statistics

if TYPE_CHECKING:
    from lq.callback.callback import QuantizationCallback
    from lq.callback.from_checkpoint import quantize_checkpoint
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
    "Quantized",
    "Quantizer",
    "QuantizerState",
    "RangeTable",
    "Target",
    "Tuning",
    "TuningStep",
    "Verification",
    "analyze",
    "benchmark",
    "calibrate",
    "compare_calibrators",
    "convert",
    "correct_bias",
    "equalize",
    "export",
    "fold_batch_norm",
    "freeze",
    "learn_rounding",
    "load",
    "load_statistics",
    "prepare",
    "quantize",
    "quantize_checkpoint",
    "quantizers",
    "ranges",
    "recalibrate",
    "register_layer",
    "register_rounding",
    "report",
    "save_statistics",
    "unprepare",
]


def __getattr__(name: str) -> Any:
    """What needs Lightning is imported on first use: a process that only runs a model need not wait for it."""
    if name in ("QuantizationCallback", "QuantizationResult", "quantize_checkpoint"):
        from lq import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
