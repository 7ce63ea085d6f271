"""What quantization does to a model, layer by layer."""

from lq.analysis.analyze import analyze
from lq.analysis.result import Advice, Analysis, LayerAnalysis

__all__ = ["Advice", "Analysis", "LayerAnalysis", "analyze"]
