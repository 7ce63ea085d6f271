"""What rounding costs, layer by layer: noise, sensitivity and time."""

from lq.analysis.analyze import analyze
from lq.analysis.result import Advice, Analysis, LayerAnalysis

__all__ = ["Advice", "Analysis", "LayerAnalysis", "analyze"]
