"""The table of layers, and the advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lq.page.document import Cell, Column, Table
from lq.page.markup import Markup, element, joined
from lq.results.analysis import Analysis, LayerAnalysis
from lq.results.report import QuantizationReport
from lq.util.display import file_size

_LAYER = Column("layer", css="name")
_REPORT = (Column("operators", "with what is fused into the layer", css="name"), Column("runs in"))
_NUMBERS = (
    Column("gain in float, dB", "what the SQNR of the model's outputs gains where this layer stays in float", True),
    Column("alone, dB", "SQNR of the model's outputs where this layer alone is quantized", True, True),
    Column("input, dB", "SQNR of the input, rounded and clipped", True, True),
    Column("weight, dB", "SQNR of the weight, rounded", True, True),
    Column("output, dB", "SQNR of the output, with the errors of all earlier layers", True, True),
    Column("cosine", "similarity of the float and the INT8 output", True, True),
    Column("clipped", "share of the input's values outside the range", True),
    Column("parameters", "elements of weight and bias", True),
    Column("float, ms", "time in the float model, per sample", True),
    Column("INT8, ms", "time in the INT8 model, per sample", True),
    Column("range of the input", "smallest and largest value on the grid", css="name"),
    Column("observed", "smallest and largest value in the analyzed data", css="name"),
)
_SCHEMES = (
    Column("weight", css="long"),
    Column("input (quantizer, range)", css="long"),
    Column("why float, or slower", css="long"),
)


def layer_table(report: QuantizationReport, analysis: Analysis | None) -> Table:
    """A row for each layer, most harmful first where that is known, else in the order of the graph."""
    analyzed = {} if analysis is None else {layer.name: layer for layer in analysis.layers}
    columns = [_LAYER, *_REPORT, *(_NUMBERS if analyzed else ()), *_SCHEMES]
    order = {} if analysis is None else {layer.name: rank for rank, layer in enumerate(analysis.by_harm())}
    layers = sorted(report.layers, key=lambda layer: order.get(layer.name, len(order)))
    rows = []
    for layer in layers:
        numbers = _numbers(analyzed.get(layer.name), analysis) if analyzed else ()
        runs_in = Cell("INT8" if layer.precision == "int8" else "float", css=layer.precision)
        rows.append([layer.name, layer.kind, runs_in, *numbers, layer.weight, layer.input, layer.note])
    advised = set() if analysis is None else {advice.layer for advice in analysis.advice()}
    marked = frozenset(index for index, layer in enumerate(layers) if layer.name in advised)
    caption = "Click a header to sort by it, again to reverse the order."
    return Table(columns, rows, caption, sortable=True, marked=marked)


def _numbers(layer: LayerAnalysis | None, analysis: Analysis | None) -> list[Cell | str]:
    if layer is None or analysis is None:
        return [Cell("") for _ in _NUMBERS]
    gain = None if layer.all_but_sqnr_db is None else layer.all_but_sqnr_db - analysis.output_sqnr_db
    return [
        _number(gain, "+.2f"),
        _number(layer.only_sqnr_db, ".1f"),
        _number(layer.input_sqnr_db, ".1f"),
        _number(layer.weight_sqnr_db, ".1f"),
        _number(layer.output_sqnr_db, ".1f"),
        _number(layer.cosine, ".5f"),
        _number(layer.clipped, ".3%"),
        _number(layer.parameters, ",d"),
        _number(layer.float_ms, ".3f"),
        _number(layer.int8_ms, ".3f"),
        _pair(layer.range),
        _pair(layer.observed),
    ]


def _number(value: float | None, form: str) -> Cell:
    return Cell("" if value is None else format(value, form), value)


def _pair(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"[{values[0]:.3g}, {values[1]:.3g}]"


def overrides_line(analysis: Analysis, present: Mapping[str, Any] | None = None) -> str:
    """``overrides={...}`` that keeps the advised layers in float, in addition to the present overrides; or ``""``."""
    advised = {advice.layer: None for advice in analysis.advice()}
    if not advised:
        return ""
    items = ", ".join(f"{name!r}: {value!r}" for name, value in {**(present or {}), **advised}.items())
    return f"overrides={{{items}}}"


def slower_markup(report: QuantizationReport) -> Markup | None:
    """Which layers INT8 makes slower in process; None if there are none."""
    slower = report.slower_layers
    if not slower:
        return None
    items = [
        element(
            "li", element("strong", layer.name), f": {layer.int8_ms:.3f} ms in INT8, {layer.float_ms:.3f} in float."
        )
        for layer in slower
    ]
    return joined(
        element(
            "p",
            f"{len(slower)} of {len(report.int8_layers)} layers are slower in INT8 than in float with PyTorch's "
            "kernels in process, for one sample, which says nothing about other engines. Where it matters, leave them "
            "in float.",
        ),
        element("ul", *items),
    )


def advice_markup(analysis: Analysis, present: Mapping[str, Any] | None = None) -> Markup:
    """Which layers to leave in float, what that gains and costs, and what to write for it."""
    advice = analysis.advice()
    left_out = (
        element("p", f"Of this analysis {analysis.left_out_text}.", class_="muted") if analysis.left_out else None
    )
    if not advice:
        nothing = "No layer stands out: leaving one in float would hardly improve the outputs."
        return joined(element("p", nothing), left_out)
    items = [
        element(
            "li",
            element("strong", item.layer),
            f": the outputs gain {item.gain_db:.2f} dB, the file grows by {file_size(item.extra_bytes)}",
            ""
            if item.extra_ms is None
            else f", a sample takes {abs(item.extra_ms):.3f} ms {'longer' if item.extra_ms >= 0 else 'less'}",
            ".",
        )
        for item in advice
    ]
    return joined(
        element(
            "p",
            f"The SQNR of the model's outputs is {analysis.output_sqnr_db:.1f} dB ({analysis.samples} samples; 6 dB "
            f"are one bit). These layers do most of the harm; what leaving each of them alone in float would do:",
        ),
        element("ol", *items),
        element("p", "To leave them in float:"),
        element("pre", element("code", f"QuantizationCallback({overrides_line(analysis, present)})")),
        left_out,
    )
