"""What INT8 cost and bought, as numbers and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from lq.callback.end.engines import Engine, notes, recommendation, recommended
from lq.callback.end.engines import scalars as engine_scalars
from lq.callback.end.engines import table as engine_table
from lq.charts.summary_chart import Comparison
from lq.results.analysis import Analysis
from lq.results.report import QuantizationReport, slower_text
from lq.results.tuning import Tuning
from lq.timing.measure import Timing
from lq.util.display import as_text, file_size


@dataclass(frozen=True)
class Side:
    """One side of the comparison: the float model or the INT8 model.

    Args:
        metrics: of the user's validation step, by name.
        size_bytes: of the model on disk, or None where it was not written.
        latency: of one sample, on the CPU, or None where it was not measured.
        batch: of a batch, on the CPU, or None likewise.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    size_bytes: int | None = None
    latency: Timing | None = None
    batch: Timing | None = None


@dataclass(frozen=True)
class QuantizationResult:
    """Float against INT8.

    Args:
        mode: ``"ptq"`` or ``"qat"``.
        target: name of the target.
        calibrator: the ranges' calibrator.
        calibrator_scores: what ``calibrator="auto"`` compared, metrics by calibrator; empty otherwise.
        float_side: the same weights in float.
        int8_side: the INT8 model.
        report: layer by layer.
        batch_size: samples in the batch that throughput was measured with.
        artifact: path of the INT8 file that ``lq.load`` runs in process; ``""`` where none is kept (``fast_dev_run``).
        exports: paths of all files that were written.
        weights: which weights were converted: those training ended with, or of which checkpoint.
        settings: what else was set, and on which data and machine, as JSON values.
        analysis: what quantization does layer by layer, or None where that was not asked for.
        engines: the float model and each engine that is installed here, as they were measured; empty where nothing was.
        stages: seconds that each stage of the end of fit took, by name.
        tuning: what was tried to keep to ``max_drop``, step by step; None where that was not asked for.
    """

    mode: str
    target: str
    calibrator: str
    calibrator_scores: dict[str, dict[str, float]]
    float_side: Side
    int8_side: Side
    report: QuantizationReport
    batch_size: int
    artifact: str
    exports: tuple[str, ...] = ()
    weights: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    analysis: Analysis | None = None
    engines: tuple[Engine, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)
    tuning: Tuning | None = None

    @property
    def recommended(self) -> Engine | None:
        """The engine to deploy on: the best median for one sample with the metrics intact; None where none was timed.

        A float one where INT8 is faster on none of them.
        """
        return recommended(self.engines)

    def scalars(self) -> dict[str, float]:
        """Everything as flat numbers for loggers: ``float/…``, ``int8/…`` (in process), ``drop/…``
        (float − INT8), ``speedup/…``, and ``engines/RUNTIME/…``.
        """
        numbers: dict[str, float] = {}
        for prefix, side in (("float", self.float_side), ("int8", self.int8_side)):
            numbers |= {f"{prefix}/{name}": value for name, value in side.metrics.items()}
            if side.size_bytes is not None:
                numbers[f"{prefix}/size_mb"] = side.size_bytes / 1e6
            if side.latency is not None:
                numbers[f"{prefix}/latency_p50_ms"] = side.latency.p50_ms
                numbers[f"{prefix}/latency_p95_ms"] = side.latency.p95_ms
            if side.batch is not None:
                numbers[f"{prefix}/throughput"] = side.batch.throughput
        for name, value in self.float_side.metrics.items():
            if name in self.int8_side.metrics:
                numbers[f"drop/{name}"] = value - self.int8_side.metrics[name]
        if self.float_side.latency is not None and self.int8_side.latency is not None:
            numbers["speedup/latency"] = self.float_side.latency.p50_ms / self.int8_side.latency.p50_ms
        if self.float_side.batch is not None and self.int8_side.batch is not None:
            numbers["speedup/throughput"] = self.int8_side.batch.throughput / self.float_side.batch.throughput
        return numbers | engine_scalars(self.engines)

    def comparisons(self) -> list[Comparison]:
        """What was measured of both models, with units and with the difference or the ratio."""
        a, b = self.float_side, self.int8_side
        rows = [
            Comparison(name, value, b.metrics[name], f"{b.metrics[name] - value:+.4f}")
            for name, value in a.metrics.items()
            if name in b.metrics
        ]
        if a.size_bytes is not None and b.size_bytes is not None:
            ratio = _times(a.size_bytes / b.size_bytes, "smaller", "larger")
            rows.append(Comparison("size, MB", a.size_bytes / 1e6, b.size_bytes / 1e6, ratio))
        if a.latency is not None and b.latency is not None:
            ratio = _times(a.latency.p50_ms / b.latency.p50_ms, "faster", "slower")
            rows.append(Comparison("latency p50, ms, batch 1", a.latency.p50_ms, b.latency.p50_ms, ratio))
        if a.batch is not None and b.batch is not None:
            ratio = _times(b.batch.throughput / a.batch.throughput, "more", "fewer")
            name = f"samples/s, batch {self.batch_size}"
            rows.append(Comparison(name, a.batch.throughput, b.batch.throughput, ratio))
        return rows

    @property
    def measured_with(self) -> str:
        """What the latencies are of; ``""`` where there are none."""
        if self.float_side.latency is None:
            return ""
        return "latency and throughput: PyTorch eager against INT8 in process, both on this machine's CPU"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> QuantizationResult:
        """The result that :meth:`to_json` gave.

        Raises:
            ValueError: where ``text`` is none.
        """

        def side(row: Mapping[str, Any]) -> Side:
            timings = {key: Timing(**row[key]) for key in ("latency", "batch") if row.get(key) is not None}
            return Side(**{**row, **timings})

        try:
            values = json.loads(text)
            values["float_side"], values["int8_side"] = side(values["float_side"]), side(values["int8_side"])
            values["report"] = QuantizationReport.from_dict(values["report"])
            values["exports"] = tuple(values.get("exports", ()))
            values["engines"] = tuple(Engine.from_dict(row) for row in values.get("engines", ()))
            if values.get("analysis") is not None:
                values["analysis"] = Analysis.from_dict(values["analysis"])
            if values.get("tuning") is not None:
                values["tuning"] = Tuning.from_dict(values["tuning"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not what lq writes to int8.json: {error!r}") from error

    def table(self) -> Table:
        """A row for each engine, with the one that is recommended; where none was timed, float against INT8."""
        n = len(self.report.int8_layers)
        title = f"{self.report.model}, {self.mode.upper()} for {self.target} ({self.calibrator}): {n} layers in INT8"
        if self.engines:
            return engine_table(self.engines, title, self.batch_size)
        table = Table(title=title)
        for header in ("", "float", "INT8", "INT8 against float"):
            table.add_column(header, justify="left" if not header else "right")
        a, b = self.float_side, self.int8_side
        for name, value in a.metrics.items():
            if name in b.metrics:
                table.add_row(name, f"{value:.4f}", f"{b.metrics[name]:.4f}", f"{b.metrics[name] - value:+.4f}")
        if a.size_bytes is not None and b.size_bytes is not None:
            ratio = _times(a.size_bytes / b.size_bytes, "smaller", "larger")
            table.add_row("size", file_size(a.size_bytes), file_size(b.size_bytes), ratio)
        return table

    def __str__(self) -> str:
        text = as_text(self.table(), 120)
        slower = self.report.slower_layers
        kept = "" if self.tuning is None else self.tuning.verdict
        lines = [kept, recommendation(self.engines), *notes(self.engines), slower_text(slower) if slower else ""]
        return text + "".join(f"{line}\n" for line in lines if line)


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.2f}x {more}" if ratio >= 1 else f"{1 / ratio:.2f}x {less}"
