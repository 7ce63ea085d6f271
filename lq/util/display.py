"""Tables and sizes as text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def as_text(table: Table, width: int) -> str:
    """A table as plain text, at most so many characters wide."""
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return buffer.getvalue()


def file_size(size: int) -> str:
    """A number of bytes with its unit, of 10^6 or 10^3 bytes."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.2f} kB"
