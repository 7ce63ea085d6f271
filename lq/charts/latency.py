"""Where the time goes, in float and in INT8."""

from __future__ import annotations

from matplotlib.figure import Figure

from lq.charts.theme import Theme, get_theme, legend, new_figure, nothing_to_show, short_names, style
from lq.results.analysis import Analysis

#: Height of a layer's pair of bars with its gap, inches.
_ROW = 0.21

TITLE = "Time by layer, slowest first"


def layer_latency(analysis: Analysis, theme: str | Theme = "light", limit: int | None = None) -> Figure:
    """Pairs of horizontal bars: milliseconds per sample in the float and in the INT8 model, the slowest layer on top.

    Args:
        analysis: of the model, with its times.
        theme: ``"light"`` or ``"dark"``.
        limit: show at most so many layers.
    """
    theme = get_theme(theme)
    layers = [layer for layer in analysis.layers if layer.float_ms is not None or layer.int8_ms is not None]
    layers = sorted(layers, key=lambda layer: -max(layer.float_ms or 0.0, layer.int8_ms or 0.0))[:limit]
    if not layers:
        return nothing_to_show(theme, TITLE, "the layers were not timed")
    figure = new_figure(theme, 9, 1.4 + _ROW * len(layers), f"{TITLE}: {analysis.model}")
    axes = figure.subplots()
    for offset, values, color, label in (
        (-0.2, [layer.float_ms for layer in layers], theme.float_, "float"),
        (0.2, [layer.int8_ms for layer in layers], theme.int8, "INT8"),
    ):
        rows = [row + offset for row in range(len(layers))]
        axes.barh(rows, [value or 0.0 for value in values], height=0.38, color=color, label=label)
    names = [layer.name + (" (float)" if layer.precision == "float" else "") for layer in layers]
    axes.set_yticks(range(len(layers)), short_names(names))
    axes.set_ylim(len(layers) - 0.4, -0.6)
    style(axes, theme, "time, ms per sample")
    legend(figure, theme, loc="outside lower left", ncols=2)
    return figure
