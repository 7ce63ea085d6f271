"""What an analysis of a quantized model finds, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

#: Signal-to-quantization-noise ratios lie within ± this many decibels: JSON knows no infinity, and float32 itself
#: has no more than 150.
SQNR_LIMIT_DB = 200.0


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer. What was not measured, or makes no sense for a layer that stays in float, is None.

    SQNR is ``10 * log10(sum x**2 / sum (x - x_int8)**2)`` in decibels: each 6 dB are one more bit of accuracy.

    Args:
        name: the layer's path in the model.
        kind: what it is, with what is fused into it: ``"conv + batch_norm + relu"``.
        precision: ``"int8"`` or ``"float"``.
        reason: why it stays in float, or ``""``.
        parameters: elements of its weight and bias.
        weight_sqnr_db: of the weight, with batch norm folded, against its rounded self.
        input_sqnr_db: of the input as the float model has it, against itself rounded and clipped.
        output_sqnr_db: of the output in the float model against that in the INT8 model, the errors of all layers in
            front included.
        cosine: cosine similarity of these two outputs, in [-1, 1].
        clipped: share of the input's values outside the range, in [0, 1].
        range: smallest and largest real value on the grid of the input.
        observed: smallest and largest value of the input in the analysed data.
        only_sqnr_db: of the model's outputs where this layer alone is quantized. The lower, the more sensitive.
        all_but_sqnr_db: of the model's outputs where all layers but this one are quantized.
        float_ms: time in the float model, milliseconds per sample.
        int8_ms: time in the INT8 model, likewise.
    """

    name: str
    kind: str
    precision: str
    reason: str = ""
    parameters: int = 0
    weight_sqnr_db: float | None = None
    input_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    cosine: float | None = None
    clipped: float | None = None
    range: tuple[float, float] | None = None
    observed: tuple[float, float] | None = None
    only_sqnr_db: float | None = None
    all_but_sqnr_db: float | None = None
    float_ms: float | None = None
    int8_ms: float | None = None


@dataclass(frozen=True)
class Advice:
    """A layer to leave in float, with ``overrides={layer: None}``, and what that gains and costs.

    Args:
        layer: its path in the model.
        gain_db: what the SQNR of the model's outputs gains.
        extra_bytes: what the file grows by.
        extra_ms: what a sample takes longer, milliseconds; None where times were not measured.
    """

    layer: str
    gain_db: float
    extra_bytes: int
    extra_ms: float | None


@dataclass(frozen=True)
class Analysis:
    """A model, layer by layer; ``str(analysis)`` is a table, the most harmful layer first.

    Args:
        model: class name of the model.
        target: name of the target.
        samples: how many samples were looked at.
        output_sqnr_db: of the model's outputs, float against INT8.
        layers: in the order of the graph.
    """

    model: str
    target: str
    samples: int
    output_sqnr_db: float
    layers: tuple[LayerAnalysis, ...]

    def by_harm(self) -> tuple[LayerAnalysis, ...]:
        """The layers, most harmful first."""
        return tuple(
            sorted(
                self.layers,
                key=lambda layer: -(layer.all_but_sqnr_db if layer.all_but_sqnr_db is not None else -SQNR_LIMIT_DB),
            )
        )

    def advice(self, limit: int = 3) -> tuple[Advice, ...]:
        """Layers to leave in float."""
        worth = [layer for layer in self.by_harm() if layer.all_but_sqnr_db is not None and layer.parameters]
        return tuple(
            Advice(
                layer.name,
                (layer.all_but_sqnr_db or 0.0) - self.output_sqnr_db,
                3 * layer.parameters,
                None if layer.float_ms is None or layer.int8_ms is None else layer.float_ms - layer.int8_ms,
            )
            for layer in worth[:limit]
        )

    def table(self) -> Table:
        table = Table(title=f"{self.model} for {self.target}")
        for header in ("layer", "operators", "runs in", "weight dB", "input dB", "only dB", "all but dB"):
            table.add_column(header, overflow="fold")
        for layer in self.by_harm():
            numbers = (layer.weight_sqnr_db, layer.input_sqnr_db, layer.only_sqnr_db, layer.all_but_sqnr_db)
            table.add_row(layer.name, layer.kind, layer.precision, *("" if n is None else f"{n:.1f}" for n in numbers))
        return table

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Analysis:
        """The analysis that :meth:`to_dict` gave, also by way of JSON."""

        def layer(row: Mapping[str, Any]) -> LayerAnalysis:
            pairs = {key: tuple(row[key]) for key in ("range", "observed") if row.get(key) is not None}
            return LayerAnalysis(**{**row, **pairs})

        return cls(**{**values, "layers": tuple(layer(row) for row in values["layers"])})
