"""Figures of what quantization did; matplotlib objects, no state of pyplot."""

from lq.charts.all_charts import gallery
from lq.charts.chart import Chart
from lq.charts.confusion import confusion_difference
from lq.charts.images import changed_predictions
from lq.charts.latency import layer_latency
from lq.charts.predictions import Predictions
from lq.charts.sensitivity_chart import sensitivity
from lq.charts.sqnr import layer_sqnr
from lq.charts.summary_chart import Comparison, summary
from lq.charts.tensors import tensor_histogram, weight_histogram
from lq.charts.theme import THEMES, Theme, get_theme

__all__ = [
    "THEMES",
    "Chart",
    "Comparison",
    "Predictions",
    "Theme",
    "changed_predictions",
    "confusion_difference",
    "gallery",
    "get_theme",
    "layer_latency",
    "layer_sqnr",
    "sensitivity",
    "summary",
    "tensor_histogram",
    "weight_histogram",
]
