"""Colours and type of all charts, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """The colours of a chart; those of data are Okabe and Ito's (2008), which all kinds of colour vision tell apart.

    Args:
        name: ``"light"`` or ``"dark"``.
        background: of the figure.
        text: of titles and labels.
        muted: of axes, and of what is shown for comparison.
        grid: of lines behind the data.
        float_: of the float model.
        int8: of the INT8 model.
        alarm: of what does harm.
        extra: of a third kind of data.
    """

    name: str
    background: str
    text: str
    muted: str
    grid: str
    float_: str
    int8: str
    alarm: str
    extra: str

    @property
    def colors(self) -> tuple[str, ...]:
        """All of them, in the order of the arguments."""
        return astuple(self)[1:]

    def diverging(self) -> LinearSegmentedColormap:
        """From less (``float_``'s orange) through the background to more (``int8``'s blue)."""
        return LinearSegmentedColormap.from_list("difference", [self.float_, self.background, self.int8])


THEMES: dict[str, Theme] = {
    "light": Theme("light", "#fefefe", "#1f2328", "#6e7781", "#e4e7eb", "#e69f00", "#0072b2", "#d55e00", "#009e73"),
    "dark": Theme("dark", "#16181c", "#e6e8eb", "#9aa2ab", "#30343a", "#e69f00", "#56b4e9", "#ff7a3d", "#00b386"),
}


def get_theme(theme: str | Theme) -> Theme:
    """The theme of that name.

    Raises:
        ValueError: where there is none.
    """
    if isinstance(theme, Theme):
        return theme
    if theme not in THEMES:
        raise ValueError(f"theme={theme!r} is unknown; choose one of {', '.join(map(repr, THEMES))}")
    return THEMES[theme]


def new_figure(theme: Theme, width: float, height: float, title: str) -> Figure:
    """An empty figure.

    Args:
        theme: its colours.
        width: in inches.
        height: likewise.
        title: what it shows, at the top.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    figure.suptitle(title, fontsize=11, color=theme.text, x=0.01, ha="left")
    return figure


def style(axes: Any, theme: Theme, xlabel: str = "", ylabel: str = "", grid: str | None = "x") -> None:
    """Give axes the theme's colours, labels (with units) and a grid along ``"x"``, ``"y"``, ``"both"`` or None."""
    axes.set_facecolor(theme.background)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(theme.muted)
    axes.tick_params(which="both", colors=theme.muted, labelcolor=theme.text, labelsize=8, length=3)
    axes.set_xlabel(xlabel, fontsize=9, color=theme.text)
    axes.set_ylabel(ylabel, fontsize=9, color=theme.text)
    if grid is not None:
        axes.grid(axis=grid, color=theme.grid, linewidth=0.8)


def legend(owner: Any, theme: Theme, **kwargs: Any) -> None:
    """A legend without a frame, of axes or of a figure."""
    owner.legend(frameon=False, fontsize=8, labelcolor=theme.text, **kwargs)


def nothing_to_show(theme: Theme, title: str, reason: str) -> Figure:
    """A small figure that says why there is no chart."""
    figure = new_figure(theme, 6, 1.4, title)
    axes = figure.subplots()
    axes.axis("off")
    axes.text(0.0, 0.5, reason, fontsize=9, color=theme.muted, va="center")
    return figure


def short_names(names: Sequence[str], limit: int = 44) -> list[str]:
    """Layer names of at most ``limit`` characters, with the middle left out of longer ones; they stay distinct."""
    kept: list[str] = []
    for name in names:
        half = (limit - 1) // 2
        short = name if len(name) <= limit else f"{name[: limit - 1 - half]}…{name[-half:]}"
        count = 2
        while short in kept:
            ending = f" ({count})"
            short = f"{name[: limit - 1 - half]}…{name[len(ending) - half :]}{ending}"
            count += 1
        kept.append(short)
    return kept


@contextmanager
def _svg_settings() -> Iterator[None]:
    # Text stays text: a page can be searched, and is a tenth as long as with outlines of glyphs.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lq", "font.family": "sans-serif"}):
        yield


def save_svg(figure: Figure, file: Any) -> None:
    """Write ``figure`` as SVG, the same bytes each time."""
    with _svg_settings():
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(file, metadata=metadata)  # savefig does this too, but draws everything twice
