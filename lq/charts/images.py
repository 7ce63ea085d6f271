"""Images that INT8 classifies differently from float."""

from __future__ import annotations

from matplotlib.figure import Figure

from lq.charts.predictions import Predictions
from lq.charts.theme import Theme, get_theme, new_figure, nothing_to_show, short_names

_COLUMNS = 6


def changed_predictions(predictions: Predictions, theme: str | Theme = "light") -> Figure:
    """A grid of images whose prediction changed: true class, float's and INT8's.

    Args:
        predictions: of both models, with images.
        theme: ``"light"`` or ``"dark"``.
    """
    theme = get_theme(theme)
    total = len(predictions.labels)
    title = f"Predictions that changed: {predictions.changed_share:.2%} of {total} images"
    if predictions.images is None or not len(predictions.changed):
        reason = "none" if predictions.images is not None else "the samples are no images"
        return nothing_to_show(theme, title, reason)
    rows = -(-len(predictions.changed) // _COLUMNS)
    figure = new_figure(theme, 9, 0.5 + 2.1 * rows, title)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).reshape(-1)
    for axes in grid:
        axes.axis("off")
    for axes, index, image in zip(grid, predictions.changed.tolist(), predictions.images, strict=False):
        label, before, after = (
            int(values[index]) for values in (predictions.labels, predictions.float_classes, predictions.int8_classes)
        )
        pixels = image.movedim(0, -1).numpy()
        axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
        verdict, color = ("both wrong", theme.muted)
        if before == label:
            verdict, color = "lost", theme.alarm
        elif after == label:
            verdict, color = "gained", theme.extra
        names = [short_names([predictions.name(which)], 15)[0] for which in (label, before, after)]
        axes.set_title(
            f"{verdict}\nis {names[0]}\nfloat {names[1]}\nINT8 {names[2]}", fontsize=7.5, color=color, loc="left"
        )
    return figure
