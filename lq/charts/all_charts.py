"""The charts that can be drawn of a run's results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lq.charts.chart import Chart
from lq.charts.confusion import confusion_difference
from lq.charts.images import changed_predictions
from lq.charts.latency import layer_latency
from lq.charts.predictions import Predictions
from lq.charts.sensitivity_chart import sensitivity
from lq.charts.sqnr import layer_sqnr
from lq.charts.summary_chart import Comparison, summary
from lq.results.analysis import Analysis


def gallery(
    comparisons: Sequence[Comparison] = (), analysis: Analysis | None = None, predictions: Predictions | None = None
) -> list[Chart]:
    """The charts for what is given.

    Args:
        comparisons: of float and INT8.
        analysis: of the layers.
        predictions: of both models.
    """
    charts = []
    if comparisons:
        charts.append(Chart("summary", "Float against INT8, the same weights.", partial(summary, comparisons)))
    if analysis is not None:
        charts.append(
            Chart(
                "sqnr",
                "How well each layer's tensors survive rounding and clipping; the longer the bar, the better. The "
                "layers that do the model's outputs most harm stand on top.",
                partial(layer_sqnr, analysis),
            )
        )
        if any(layer.only_sqnr_db is not None for layer in analysis.layers):
            caption = (
                "What each layer does to the model's outputs against its size: high above, and low below, are the "
                "layers that are worth keeping in float."
            )
            charts.append(Chart("sensitivity", caption, partial(sensitivity, analysis)))
        if any(layer.int8_ms is not None for layer in analysis.layers):
            caption = "Where the time of one sample goes, in the float and in the INT8 model."
            charts.append(Chart("latency", caption, partial(layer_latency, analysis)))
    if predictions is not None:
        caption = "On the diagonal blue is gained and orange is lost; elsewhere blue is a new confusion."
        charts.append(Chart("confusion", caption, partial(confusion_difference, predictions), is_picture=True))
        if predictions.images is not None and len(predictions.changed):
            caption = "Images that INT8 classifies differently from float."
            charts.append(Chart("changed", caption, partial(changed_predictions, predictions), is_picture=True))
    return charts
