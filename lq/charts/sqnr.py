"""Signal-to-quantization-noise ratio, layer by layer."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lq.charts.theme import Theme, get_theme, legend, new_figure, nothing_to_show, short_names, style
from lq.results.analysis import Analysis, LayerAnalysis

#: Height of a layer's bar with its gap, inches.
_ROW = 0.19

TITLE = "SQNR by layer, most harmful first"


def layer_sqnr(analysis: Analysis, theme: str | Theme = "light", limit: int | None = None) -> Figure:
    """Horizontal bars: how well each layer's input survives rounding and clipping, the most harmful layer on top.

    Beside the bar are a diamond for the layer's weight and a tick for its output, which carries the errors of all
    earlier layers; on the right is what the SQNR of the model's outputs gains if the layer stays in float. The layers
    that the analysis advises to leave in float are in another colour.

    Args:
        analysis: of the model.
        theme: ``"light"`` or ``"dark"``.
        limit: show at most so many layers.
    """
    theme = get_theme(theme)
    layers = [layer for layer in analysis.by_harm() if layer.precision == "int8" and layer.input_sqnr_db is not None]
    layers = layers[:limit]
    if not layers:
        return nothing_to_show(theme, TITLE, "no layer runs in INT8")
    advised = {advice.layer for advice in analysis.advice()}
    figure = new_figure(theme, 9, 1.5 + _ROW * len(layers), f"{TITLE}: {analysis.model}")
    axes = figure.subplots()
    rows = range(len(layers))
    axes.barh(
        rows,
        [layer.input_sqnr_db or 0.0 for layer in layers],
        height=0.62,
        color=[theme.alarm if layer.name in advised else theme.int8 for layer in layers],
    )
    axes.barh([0], [0], color=theme.int8, label="input")
    axes.barh([0], [0], color=theme.alarm, label="input; advised to stay in float")
    for values, marker, color, label in (
        ([layer.weight_sqnr_db for layer in layers], "D", theme.extra, "weight"),
        ([layer.output_sqnr_db for layer in layers], "|", theme.text, "output, with all earlier errors"),
    ):
        known = [(value, row) for row, value in zip(rows, values, strict=True) if value is not None]
        if known:
            look = {"s": 60} if marker == "|" else {"s": 22, "edgecolors": theme.background, "linewidths": 0.8}
            axes.scatter(*zip(*known, strict=True), marker=marker, color=color, label=label, zorder=3, **look)
    axes.set_yticks(rows, short_names([layer.name for layer in layers]))
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    style(axes, theme, "SQNR, dB (6 dB are one bit)")
    beside: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "fontsize": 8,
        "color": theme.muted,
        "va": "center",
    }
    axes.text(1.01, -1.0, "gain in float, dB", **beside)
    for row, layer in enumerate(layers):
        axes.text(1.02, row, _gain(layer, analysis), **beside)
    legend(figure, theme, loc="outside lower left", ncols=4)
    return figure


def _gain(layer: LayerAnalysis, analysis: Analysis) -> str:
    if layer.all_but_sqnr_db is None:
        return ""
    return f"{layer.all_but_sqnr_db - analysis.output_sqnr_db:+.2f}"
