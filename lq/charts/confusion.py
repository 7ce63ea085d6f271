"""Which classes INT8 confuses and float does not, and the reverse."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lq.charts.predictions import Predictions
from lq.charts.theme import Theme, get_theme, new_figure, nothing_to_show, short_names, style

#: At most so many classes have a row: those that changed most.
_CLASSES = 24

#: Up to so many classes, each cell has its number.
_NUMBERS = 16


def confusion_difference(predictions: Predictions, theme: str | Theme = "light") -> Figure:
    """Confusion matrix of the INT8 model minus that of the float model.

    On the diagonal blue is gained and orange is lost; elsewhere blue is a new confusion and orange one less. If there
    are many classes, only those that changed most are shown.

    Args:
        predictions: of both models.
        theme: ``"light"`` or ``"dark"``.
    """
    theme = get_theme(theme)
    difference = predictions.confusion(predictions.int8_classes) - predictions.confusion(predictions.float_classes)
    count = predictions.num_classes
    title = f"Confusion, INT8 minus float, {len(predictions.labels)} samples"
    if not difference.any():
        return nothing_to_show(theme, title, "no difference: the same number of samples in every cell")
    chosen = torch.arange(count)
    if count > _CLASSES:
        moved = difference.abs().sum(0) + difference.abs().sum(1)
        chosen = moved.argsort(descending=True, stable=True)[:_CLASSES].sort().values
        title += f", the {_CLASSES} of {count} classes that changed most"
    cells = difference[chosen][:, chosen]
    names = short_names([predictions.name(int(label)) for label in chosen], 18)
    side = 2.2 + 0.32 * len(chosen)
    figure = new_figure(theme, max(5.6, side + 1.2), max(3.6, side), title)
    axes = figure.subplots()
    reach = max(1, int(cells.abs().max()))
    image = axes.imshow(cells.numpy(), cmap=theme.diverging(), vmin=-reach, vmax=reach)
    if len(chosen) <= _NUMBERS:
        for row, column in cells.nonzero().tolist():
            value = int(cells[row, column])
            axes.text(column, row, f"{value:+d}", ha="center", va="center", fontsize=8, color=theme.text)
    axes.set_xticks(range(len(chosen)), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(chosen)), names)
    style(axes, theme, "predicted class", "true class", grid=None)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.locator = MaxNLocator(integer=True, nbins=7)
    bar.update_ticks()
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.text, labelsize=8)
    bar.set_label("samples, INT8 − float", fontsize=9, color=theme.text)
    return figure
