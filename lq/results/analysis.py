"""What an analysis of a quantized model finds, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from lq.results.report import timed
from lq.util.display import as_text

#: Signal-to-quantization-noise ratios lie within ± this many decibels: JSON has no infinity, and float32 itself
#: has no more than 150.
SQNR_LIMIT_DB = 200.0

#: Gain in the SQNR of the outputs below which leaving a layer in float is not worth it. A layer that makes a share
#: ``s`` of the noise gains ``-10 * log10(1 - s)``: 1 dB is a fifth of all noise, where in a sound network of 20 layers
#: each makes about a twentieth (0.2 dB).
MIN_GAIN_DB = 1.0

#: Bytes by which an element of a weight grows in float.
_FLOAT32_OVER_INT8 = 3


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer. What was not measured, or makes no sense for a layer that stays in float, is None.

    A residual add that is a kernel of its own has two inputs: the figures are those of the one that rounding harms
    most.

    SQNR is ``10 * log10(sum x**2 / sum (x - x_int8)**2)`` in decibels: each 6 dB are one more bit of accuracy.

    Args:
        name: the layer's path in the model.
        kind: what it is, with what is fused into it: ``"conv + batch_norm + relu"``.
        precision: ``"int8"`` or ``"float"``.
        reason: why it stays in float, or ``""``.
        parameters: elements of its weight and bias.
        weight_sqnr_db: of the weight, with batch norm folded, against its rounded self.
        input_sqnr_db: of the input as the float model has it, against itself rounded and clipped.
        output_sqnr_db: of the output in the float model against that in the INT8 model, including the errors of all
            earlier layers.
        cosine: cosine similarity of these two outputs, in [-1, 1].
        clipped: share of the input's values more than half a step outside the range, in [0, 1].
        range: smallest and largest real value on the grid of the input.
        observed: smallest and largest value of the input in the analyzed data.
        only_sqnr_db: of the model's outputs where this layer alone is quantized. The lower, the more sensitive.
        all_but_sqnr_db: of the model's outputs where all layers but this one are quantized. None also where leaving it
            in float would need the range of a tensor that has no statistics.
        float_ms: time in the float model, milliseconds per sample.
        int8_ms: time in the INT8 model, likewise.
        weights: elements of its weight alone; 0 where it is not a convolution or linear layer.
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
    weights: int = 0

    @property
    def in_int8(self) -> bool:
        return self.precision == "int8"


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
        left_out: names of the layers in INT8 whose sensitivity was not measured, or not completely, for lack of time.
    """

    model: str
    target: str
    samples: int
    output_sqnr_db: float
    layers: tuple[LayerAnalysis, ...]
    left_out: tuple[str, ...] = ()

    def with_times(self, times: Sequence[Mapping[str, float]]) -> Analysis:
        """The analysis with ``float_ms`` and ``int8_ms`` of each layer, as far as they are there, in order."""
        return replace(self, layers=timed(self.layers, times))

    def by_harm(self) -> tuple[LayerAnalysis, ...]:
        """The layers in INT8, the most harmful first, and then those in float.

        The most harmful one leaves the smallest SQNR of the outputs when it alone is quantized. Where sensitivity was
        not measured, it is the one with the smallest SQNR of its weight or input.
        """

        def harm(layer: LayerAnalysis) -> tuple[bool, float]:
            own = [value for value in (layer.weight_sqnr_db, layer.input_sqnr_db) if value is not None]
            local = min(own, default=SQNR_LIMIT_DB)
            return not layer.in_int8, local if layer.only_sqnr_db is None else layer.only_sqnr_db

        return tuple(sorted(self.layers, key=harm))

    def advice(self, limit: int = 3) -> tuple[Advice, ...]:
        """The layers that gain most from staying in float, best first; none that gains less than :data:`MIN_GAIN_DB`.

        Each gain is that of one layer alone: two layers together may gain more or less than the sum. Empty where
        sensitivity was not measured.

        Args:
            limit: how many at most.

        Raises:
            ValueError: where ``limit`` is negative.
        """
        if limit < 0:
            raise ValueError(f"limit={limit} must be at least 0")
        calls: dict[str, list[LayerAnalysis]] = {}  # a layer that is called twice has a row for each
        for layer in self.layers:
            if layer.in_int8 and layer.all_but_sqnr_db is not None:
                calls.setdefault(layer.name, []).append(layer)
        candidates = [self._advice(name, rows) for name, rows in calls.items()]
        worth = [advice for advice in candidates if advice.gain_db >= MIN_GAIN_DB]
        return tuple(sorted(worth, key=lambda advice: -advice.gain_db)[:limit])

    def _advice(self, name: str, calls: list[LayerAnalysis]) -> Advice:
        assert calls[0].all_but_sqnr_db is not None
        times = [(call.float_ms, call.int8_ms) for call in calls]
        extra = [in_float - int8 for in_float, int8 in times if in_float is not None and int8 is not None]
        return Advice(
            layer=name,
            gain_db=calls[0].all_but_sqnr_db - self.output_sqnr_db,
            extra_bytes=_FLOAT32_OVER_INT8 * calls[0].weights,
            extra_ms=max(0.0, sum(extra)) if len(extra) == len(times) else None,
        )

    def table(self) -> Table:
        table = Table(title=f"{self.model} for {self.target}: {self.output_sqnr_db:.1f} dB on {self.samples} samples")
        table.add_column("layer", overflow="fold")
        headers = ("weight dB", "input dB", "clipped", "output dB", "alone dB", "all others dB", "float ms", "INT8 ms")
        for header in headers:
            table.add_column(header, justify="right")
        table.add_column("why float", overflow="fold")
        for layer in self.by_harm():
            noise = (_text(layer.weight_sqnr_db, ".1f"), _text(layer.input_sqnr_db, ".1f"), _text(layer.clipped, ".2%"))
            outputs = (layer.output_sqnr_db, layer.only_sqnr_db, layer.all_but_sqnr_db)
            times = (_text(layer.float_ms, ".3g"), _text(layer.int8_ms, ".3g"))
            decibels = (_text(value, ".1f") for value in outputs)
            table.add_row(layer.name, *noise, *decibels, *times, layer.reason)
        advice = [f"{advice.layer}: +{advice.gain_db:.1f} dB" for advice in self.advice()]
        lines = [f"left in float, would gain: {', '.join(advice)}"] if advice else []
        if self.left_out:
            lines.append(self.left_out_text)
        table.caption = "\n".join(lines) or None
        return table

    @property
    def left_out_text(self) -> str:
        """What there was no time for; ``""`` if nothing was left out."""
        if not self.left_out:
            return ""
        count = len({layer.name for layer in self.layers if layer.in_int8})
        return (
            f"the sensitivity of {len(self.left_out)} of {count} layers, those whose weights and inputs rounding "
            f"disturbs least, was left out for lack of time"
        )

    def __str__(self) -> str:
        return as_text(self.table(), 150)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Analysis:
        """The analysis that :meth:`to_dict` gave, also after a round trip through JSON."""

        def layer(row: Mapping[str, Any]) -> LayerAnalysis:
            pairs = {key: tuple(row[key]) for key in ("range", "observed") if row.get(key) is not None}
            return LayerAnalysis(**{**row, **pairs})

        layers = tuple(layer(row) for row in values["layers"])
        return cls(**{**values, "layers": layers, "left_out": tuple(values.get("left_out", ()))})


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
