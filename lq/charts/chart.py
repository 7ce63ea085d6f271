"""A chart that can be drawn in any theme, with its name and caption."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lq.charts.theme import THEMES, Theme, save_svg


@dataclass(frozen=True)
class Chart:
    """A figure yet to be drawn.

    Args:
        name: for tags and anchors: lower case, ``/`` between parts.
        caption: what it shows and how it is read, a sentence or two.
        draw: makes the figure in a theme.
        is_picture: whether it holds pixels or a colour map, which the theme does not colour.
    """

    name: str
    caption: str
    draw: Callable[[str | Theme], Figure]
    is_picture: bool = False

    def png(self, theme: str | Theme = "light", dpi: int = 100) -> bytes:
        """The figure as PNG."""
        buffer = io.BytesIO()
        figure = self.draw(theme)
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(buffer)  # not savefig, which draws everything twice
        return buffer.getvalue()

    def svg(self) -> tuple[bytes, bytes]:
        """The figure as SVG, light and dark; drawn once and coloured twice.

        Raises:
            ValueError: where it is a picture.
        """
        if self.is_picture:
            raise ValueError(f"the chart {self.name!r} is a picture; use png")
        buffer = io.BytesIO()
        save_svg(self.draw("light"), buffer)
        light = buffer.getvalue().decode()
        colors = dict(zip(THEMES["light"].colors, THEMES["dark"].colors, strict=True))
        dark = re.sub("|".join(colors), lambda match: colors[match.group()], light)
        return light.encode(), dark.encode()
