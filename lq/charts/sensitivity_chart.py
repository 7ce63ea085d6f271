"""How much a layer matters against how large it is."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lq.charts.theme import Theme, get_theme, new_figure, nothing_to_show, short_names, style
from lq.results.analysis import Analysis, LayerAnalysis

TITLE = "Sensitivity against size"

#: Number of layers that are labelled with their names.
_NAMED = 6


def sensitivity(analysis: Analysis, theme: str | Theme = "light") -> Figure:
    """Two scatter plots over the layers' parameters (log scale).

    Above, what the SQNR of the model's outputs gains where the layer stays in float: what is high up is worth its
    bytes. Below, the SQNR of the outputs where this layer alone is quantized: what is low down is sensitive. Layers
    without parameters (adds) stand at the left edge.

    Args:
        analysis: of the model, with its sensitivities.
        theme: ``"light"`` or ``"dark"``.
    """
    theme = get_theme(theme)
    layers = [
        layer for layer in analysis.by_harm() if layer.all_but_sqnr_db is not None and layer.only_sqnr_db is not None
    ]
    if not layers:
        return nothing_to_show(theme, TITLE, "the sensitivity of the layers was not measured")
    figure = new_figure(theme, 9, 6.4, f"{TITLE}: {analysis.model}")
    upper, lower = figure.subplots(2, 1, sharex=True)
    advised = {advice.layer for advice in analysis.advice()}
    sizes = [layer.parameters for layer in layers if layer.parameters]
    edge = min(sizes, default=1) / 4
    x = [layer.parameters or edge for layer in layers]
    colors = [theme.alarm if layer.name in advised else theme.int8 for layer in layers]
    gains = [(layer.all_but_sqnr_db or 0.0) - analysis.output_sqnr_db for layer in layers]
    alone = [layer.only_sqnr_db or 0.0 for layer in layers]
    upper.axhline(0, color=theme.muted, linewidth=0.8)
    for axes, y, label in (
        (upper, gains, "gain with this layer\nin float, dB"),
        (lower, alone, "SQNR with this layer\nalone in INT8, dB"),
    ):
        axes.set_xscale("log")
        axes.scatter(x, y, s=26, color=colors, alpha=0.85, linewidths=0)
        style(axes, theme, "", label, grid="both")
        axes.margins(y=0.12)
        worst = sorted(range(len(layers)), key=lambda i: -y[i] if axes is upper else y[i])[:_NAMED]
        _name(axes, theme, [layers[i] for i in worst], [x[i] for i in worst], [y[i] for i in worst])
    lower.set_xlabel("parameters", fontsize=9, color=theme.text)
    if any(not layer.parameters for layer in layers):
        lower.set_xlabel("parameters (left edge: layers without any)", fontsize=9, color=theme.text)
    return figure


def _name(axes: object, theme: Theme, layers: Sequence[LayerAnalysis], x: Sequence[float], y: Sequence[float]) -> None:
    """Names in a column at the right, from top to bottom as the points lie, each with a line to its point."""
    order = sorted(range(len(layers)), key=lambda i: -y[i])
    names = short_names([layers[i].name for i in order], 30)
    low, high = axes.get_ylim()  # type: ignore[attr-defined]
    # As a fraction of the height, which gives the distance of two lines of text.
    places = [(y[i] - low) / (high - low) for i in order]
    step = 0.11
    for index in range(1, len(places)):
        places[index] = min(places[index], places[index - 1] - step)
    lift = max(0.0, 0.02 - min(places))
    places = [place + lift for place in places]
    for index in range(len(places) - 2, -1, -1):
        places[index] = max(places[index], places[index + 1] + step)
    for i, name, place in zip(order, names, places, strict=True):
        axes.annotate(  # type: ignore[attr-defined]
            name,
            (x[i], y[i]),
            (1.02, place),
            textcoords="axes fraction",
            fontsize=8,
            color=theme.text,
            va="center",
            arrowprops={"arrowstyle": "-", "color": theme.muted, "linewidth": 0.6, "shrinkB": 3},
        )
