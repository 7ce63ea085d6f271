"""The page of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lq.callback.end.engines import cells, notes, recommendation
from lq.callback.result import QuantizationResult
from lq.charts.all_charts import gallery
from lq.charts.chart import Chart
from lq.charts.predictions import Predictions
from lq.page.document import Column, Table, figure, page, section
from lq.page.layers import advice_markup, layer_table, slower_markup
from lq.page.markup import Markup, element
from lq.results.tuning import Tuning

if TYPE_CHECKING:
    from lq.timing.benchmark import Benchmark


def result_page(
    result: QuantizationResult,
    predictions: Predictions | None = None,
    tensors: Sequence[Chart] = (),
    runtimes: Benchmark | None = None,
) -> str:
    """What was done, what it cost and bought, layer by layer, with charts and advice, as one HTML file.

    Args:
        result: of the conversion.
        predictions: of both models, for the charts of them.
        tensors: charts of single tensors to show as well.
        runtimes: latencies on every runtime.
    """
    report = result.report
    comparisons = result.comparisons()
    facts = Table(
        [Column(""), Column("float", "", True), Column("INT8", "", True), Column("difference")],
        [[item.name, *item.texts, item.note] for item in comparisons],
    )
    sections = {}
    if result.engines:
        sections["Engines"] = section("Engines", *_engines(result))
    sections["Result"] = section("Result", facts.markup(), element("p", result.measured_with, class_="muted"))
    if result.tuning is not None:
        sections["Accuracy"] = section("Accuracy", *_tuning(result.tuning))
    if runtimes is not None:
        sections["Runtimes"] = section("Runtimes", _runtimes(runtimes).markup())
    slower = slower_markup(report)
    if result.analysis is not None or slower is not None:
        present = result.settings.get("overrides")
        advice = None if result.analysis is None else advice_markup(result.analysis, present)
        sections["Advice"] = section("Advice", advice, slower)
    charts = gallery(comparisons, result.analysis, predictions)
    if charts or tensors:
        sections["Charts"] = section("Charts", *map(figure, [*charts, *tensors]))
    sections["Layers"] = section("Layers", layer_table(report, result.analysis).markup())
    sections["Settings"] = section("Settings", settings_table(_settings(result)).markup())
    count = len(report.int8_layers)
    title = f"{report.model} in INT8"
    lead = f"{result.mode.upper()} for {result.target}: {count} layers in INT8, {len(report.float_layers)} in float."
    return page(title, lead, list(sections.values()), list(sections))


def _engines(result: QuantizationResult) -> list[Markup]:
    """The table of engines, the recommended one marked, with what did not work below it."""
    headers, rows = cells(result.engines, result.batch_size)
    chosen = result.recommended
    marked = frozenset(index for index, engine in enumerate(result.engines) if engine is chosen)
    table = Table([Column(header, "", index > 0) for index, header in enumerate(headers)], rows, marked=marked)
    lines = [recommendation(result.engines), *notes(result.engines)]
    return [table.markup(), *(element("p", line[0].upper() + line[1:] + ".") for line in lines if line)]


def _tuning(tuning: Tuning) -> list[Markup]:
    """What was tried to keep to the accuracy, the step that was taken marked."""
    headers, rows = tuning.cells()
    columns = [Column(header, "", index > 0) for index, header in enumerate(headers)]
    return [
        Table(columns, rows, marked=frozenset([tuning.chosen])).markup(),
        element("p", f"{tuning.verdict[0].upper()}{tuning.verdict[1:]}."),
    ]


def settings_table(settings: dict[str, Any]) -> Table:
    """Names and values; of a mapping its items."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {text(item)}" for key, item in value.items()) or "none"
        if isinstance(value, list | tuple):
            return ", ".join(map(text, value)) or "none"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return Table([Column("setting"), Column("value")], [[name, text(value)] for name, value in settings.items()])


def _settings(result: QuantizationResult) -> dict[str, Any]:
    stages = {"end of fit, s": {name: f"{value:.1f}" for name, value in result.stages.items()}}
    settings: dict[str, Any] = {
        "mode": result.mode,
        "target": result.target,
        "calibrator": result.calibrator,
        "weights": result.weights,
        **result.settings,
        "files": list(result.exports) or [result.artifact or "none kept"],
        **(stages if result.stages else {}),
    }
    if result.calibrator_scores:
        settings["calibrators compared"] = result.calibrator_scores
    if result.report.fold_difference is not None:
        difference = f"{result.report.fold_difference:.1e} (largest relative difference)"
        settings["batch norm folded"] = difference
    return settings


def _runtimes(runtimes: Benchmark) -> Table:
    columns = [Column("model"), Column("runtime"), Column("batch", "", True), Column("threads", "", True)]
    columns += [Column(name, "", True) for name in ("p50, ms", "p95, ms", "samples/s", "against float")]
    rows = [
        [
            row.model,
            row.runtime,
            str(row.batch_size),
            str(row.threads),
            f"{row.p50_ms:.3g}",
            f"{row.p95_ms:.3g}",
            f"{row.throughput:.0f}",
            "" if row.speedup is None else f"{row.speedup:.2f}×",
        ]
        for row in runtimes.rows
    ]
    return Table(columns, rows, f"on {runtimes.machine}" if runtimes.machine else "")
