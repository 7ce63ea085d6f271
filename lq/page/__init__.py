"""The report as one HTML file that needs nothing else."""

from lq.page.document import Cell, Column, Table, figure, page, section
from lq.page.layers import advice_markup, layer_table, overrides_line
from lq.page.markup import Markup, element, joined

__all__ = [
    "Cell",
    "Column",
    "Markup",
    "Table",
    "advice_markup",
    "element",
    "figure",
    "joined",
    "layer_table",
    "overrides_line",
    "page",
    "section",
]
