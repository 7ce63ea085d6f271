"""The page itself: sections, tables and pictures in one file, without external resources."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from lq.charts.chart import Chart
from lq.page.markup import Markup, element, joined
from lq.page.style import CSS, SCRIPT


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: its header.
        meaning: a further sentence, shown when the header is hovered over.
        is_number: whether it is set, and sorted, as numbers.
        smallest_first: whether the first click sorts numbers upwards.
        css: class of its cells.
    """

    title: str
    meaning: str = ""
    is_number: bool = False
    smallest_first: bool = False
    css: str = ""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted by where that is something else.

    Args:
        text: shown.
        value: sorted by; None for a number that is not known.
        css: class of this cell.
    """

    text: str
    value: float | None = None
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        columns: from left to right.
        rows: cells, or plain text; as many as there are columns.
        caption: what it shows.
        sortable: whether a click on a header sorts it.
        marked: indices of rows that stand out.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    sortable: bool = False
    marked: frozenset[int] = frozenset()

    def markup(self) -> Markup:
        header = [
            element(
                "th",
                element("button", column.title, type="button") if self.sortable else column.title,
                class_="number" if column.is_number else None,
                title=column.meaning or None,
                scope="col",
                data_first="ascending" if column.smallest_first else None,
            )
            for column in self.columns
        ]
        rows = [
            element(
                "tr",
                *(self._cell(column, cell) for column, cell in zip(self.columns, row, strict=True)),
                class_="advised" if index in self.marked else None,
            )
            for index, row in enumerate(self.rows)
        ]
        table = element(
            "table",
            element("caption", self.caption) if self.caption else None,
            element("thead", element("tr", *header)),
            element("tbody", joined(*rows)),
            class_="sortable" if self.sortable else None,
        )
        if not self.sortable:
            return table
        # A scrolling region has to be reachable with the keyboard as well.
        return element("div", table, class_="wide", tabindex=0, role="region", aria_label=self.caption or "table")

    def _cell(self, column: Column, cell: Cell | str) -> Markup:
        cell = Cell(cell) if isinstance(cell, str) else cell
        css = " ".join(name for name in ("number" if column.is_number else "", column.css, cell.css) if name)
        value = None
        if column.is_number and self.sortable:
            value = "" if cell.value is None else f"{cell.value:.9g}"
        return element("td", cell.text, class_=css or None, data_value=value)


def section(title: str, *content: Markup | None) -> Markup:
    """A heading that can be linked to, and what stands below it."""
    return element("section", element("h2", title, id=anchor(title)), joined(*content))


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def figure(chart: Chart) -> Markup:
    """A chart in both themes; the browser shows the one it is set to, and prints the light one."""
    if chart.is_picture:
        light, dark = (_data("image/png", chart.png(theme)) for theme in ("light", "dark"))
    else:
        light, dark = (_data("image/svg+xml", drawn) for drawn in chart.svg())
    picture = element(
        "picture",
        element("source", srcset=dark, media="screen and (prefers-color-scheme: dark)"),
        element("img", src=light, alt=f"{chart.name}: {chart.caption}"),
    )
    return element("figure", picture, element("figcaption", chart.caption), id=f"chart-{chart.name.replace('/', '-')}")


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def page(title: str, lead: str, sections: Sequence[Markup], titles: Sequence[str] = ()) -> str:
    """A whole HTML file.

    Args:
        title: of the page.
        lead: a sentence below it.
        sections: from :func:`section`.
        titles: of the sections that are linked to at the top.
    """
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(CSS)),
    )
    links = element("nav", *(element("a", name, href=f"#{anchor(name)}") for name in titles)) if titles else None
    body = joined(
        element("header", element("h1", title), element("p", lead, class_="muted"), links),
        element("main", joined(*sections)),
        element("script", Markup(SCRIPT)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
