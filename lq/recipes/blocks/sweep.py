"""Configurations side by side: a table and a chart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from lq.util.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One configuration: accuracy in [0, 1], size of the file in 10^6 bytes, median time of one image in ms."""

    target: str
    calibrator: str
    top1: float
    size_mb: float
    p50_ms: float = 0.0


def table_of(rows: list[Row]) -> Table:
    table = Table()
    for header in ("target", "calibrator", "top-1 %", "against float", "MB", "ms, batch 1", "faster"):
        table.add_column(header, justify="left" if header in ("target", "calibrator") else "right")
    reference = rows[0]
    for row in rows:
        table.add_row(
            row.target or "float",
            row.calibrator,
            f"{row.top1:.2%}"[:-1],
            "" if row is reference else f"{100 * (row.top1 - reference.top1):+.2f}",
            f"{row.size_mb:.2f}",
            f"{row.p50_ms:.2f}",
            "" if row is reference else f"{reference.p50_ms / row.p50_ms:.2f}×",
        )
    return table


def save_chart(rows: list[Row], data: str, path: Path) -> None:
    """Bars of the change in accuracy by INT8, a group for each calibrator and a colour for each target."""
    reference, configurations = rows[0], rows[1:]
    targets = list(dict.fromkeys(row.target for row in configurations))
    calibrators = list(dict.fromkeys(row.calibrator for row in configurations))
    height = 0.8 / len(targets)
    figure = Figure(figsize=(8, 1.6 + 0.35 * len(configurations)), layout="constrained")
    axes = figure.subplots()
    for index, target in enumerate(targets):
        of_target = [row for row in configurations if row.target == target]
        places = [calibrators.index(row.calibrator) + (index - (len(targets) - 1) / 2) * height for row in of_target]
        points = [100 * (row.top1 - reference.top1) for row in of_target]
        bars = axes.barh(places, points, height * 0.9, label=target)
        axes.bar_label(bars, [f"{value:+.2f}" for value in points], padding=4, fontsize=9)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(calibrators)), calibrators)
    axes.invert_yaxis()
    axes.set_xlabel("INT8 against float, percentage points of top-1")
    axes.set_title(f"{data}: float {reference.top1:.2%}", loc="left")
    axes.margins(x=0.15)
    axes.legend(title="target", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=150))
