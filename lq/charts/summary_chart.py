"""Float against INT8 at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from lq.charts.theme import Theme, get_theme, new_figure, nothing_to_show, style

TITLE = "Float against INT8"

_COLUMNS = 5


@dataclass(frozen=True)
class Comparison:
    """One quantity of both models.

    Args:
        name: with its unit: ``"size, MB"``.
        float_: of the float model.
        int8: of the INT8 model.
        note: the difference or the ratio, in words.
    """

    name: str
    float_: float
    int8: float
    note: str = ""

    @property
    def texts(self) -> tuple[str, str]:
        """Both as text: four digits, and no powers of ten below a billion."""
        float_, int8 = (f"{v:,.0f}" if 1e4 <= abs(v) < 1e9 else f"{v:.4g}" for v in (self.float_, self.int8))
        return float_, int8


def summary(comparisons: Sequence[Comparison], theme: str | Theme = "light") -> Figure:
    """A panel for each quantity, with a bar for float and one for INT8.

    Args:
        comparisons: accuracy, size, latency and whatever else was measured.
        theme: ``"light"`` or ``"dark"``.
    """
    theme = get_theme(theme)
    if not comparisons:
        return nothing_to_show(theme, TITLE, "nothing was measured")
    columns = min(_COLUMNS, len(comparisons))
    rows = -(-len(comparisons) // columns)
    height = 0.5 + 2.3 * rows
    figure = new_figure(theme, max(4.0, 2.0 * columns), height, TITLE)
    # Every fit draws this chart, and finding a layout would take half of the time.
    figure.set_layout_engine(None)
    figure.subplots_adjust(0.5 / figure.get_figwidth(), 0.55 / height, 0.99, 1 - 0.65 / height, wspace=0.5, hspace=0.6)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in panels[len(comparisons) :]:
        axes.axis("off")
    for axes, comparison in zip(panels, comparisons, strict=False):
        values = [comparison.float_, comparison.int8]
        bars = axes.bar(["float", "INT8"], values, width=0.62, color=[theme.float_, theme.int8])
        axes.bar_label(bars, comparison.texts, fontsize=8, color=theme.text, padding=2)
        axes.set_title(comparison.name, fontsize=9, color=theme.text)
        style(axes, theme, comparison.note, grid="y")
        axes.margins(y=0.16)
    return figure
