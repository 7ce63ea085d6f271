"""Tables as markdown, which TensorBoard's text view sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lq.callback.end.engines import Engine, cells, notes, recommendation
from lq.page.layers import layer_table, overrides_line
from lq.results.analysis import Analysis
from lq.results.report import QuantizationReport


def layers_markdown(report: QuantizationReport, analysis: Analysis | None) -> dict[str, str]:
    """The tables of the layers by name, most harmful layer first where that is known.

    ``"layers"`` has the scheme and the range of each; ``"measured"``, with an analysis, what each does. In one table
    the columns would be a letter wide.
    """
    table = layer_table(report, analysis)
    numbers = [index for index, column in enumerate(table.columns) if column.is_number]
    schemes = [index for index, column in enumerate(table.columns) if not column.is_number]
    chosen = {"layers": schemes, "measured": [0, *numbers]} if numbers else {"layers": schemes}
    return {
        name: _markdown(
            [table.columns[index].title for index in columns],
            [
                [cell if isinstance(cell, str) else cell.text for cell in (row[i] for i in columns)]
                for row in table.rows
            ],
        )
        for name, columns in chosen.items()
    }


def engines_markdown(engines: Sequence[Engine], batch_size: int) -> str:
    """A row for each engine, and which one is recommended."""
    headers, rows = cells(engines, batch_size)
    return "\n\n".join(text for text in (_markdown(headers, rows), recommendation(engines), *notes(engines)) if text)


def advice_markdown(analysis: Analysis, present: Mapping[str, Any] | None = None) -> str:
    """Which layers to leave in float, with the line to write: beside what is overridden already."""
    advice = analysis.advice()
    if not advice:
        return "No layer stands out."
    rows = [
        [
            item.layer,
            f"{item.gain_db:.2f}",
            f"{item.extra_bytes:,}",
            "" if item.extra_ms is None else f"{item.extra_ms:.3f}",
        ]
        for item in advice
    ]
    table = _markdown(["leave in float", "gain, dB", "extra bytes", "extra ms per sample"], rows)
    left_out = f"\n\nOf this analysis {analysis.left_out_text}." if analysis.left_out else ""
    return f"{table}\n\n`QuantizationCallback({overrides_line(analysis, present)})`{left_out}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
