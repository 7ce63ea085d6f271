"""The engines that a network can be deployed on, as they were measured, and which of them to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lq.timing.measure import Timing
from lq.util.display import file_size

#: How far a metric may be from float's to count as intact: so much, or that share of it where it is larger than 1. For
#: accuracies in [0, 1] these are two points.
METRIC_TOLERANCE = 0.02

#: Names of the float rows.
EAGER, FOLDED = "eager", "folded"

_TITLES = {
    EAGER: "float, eager",
    FOLDED: "float, folded",
    "torch": "INT8, in process",
    "aoti": "INT8, AOTInductor",
    "onnxruntime": "INT8, ONNX Runtime",
    "openvino": "INT8, OpenVINO",
    "executorch": "INT8, ExecuTorch",
}

#: Metrics with a column in a table; `int8.json` has all.
_MOST_METRICS = 3


@dataclass(frozen=True)
class Engine:
    """One way to run the network on this machine's CPU.

    Args:
        runtime: ``"eager"`` (the float model in PyTorch), ``"folded"`` (the same with batch norm folded, and without
            weights that meet nothing but padding: what the files have but INT8), or what ``lq.load`` calls an engine.
        file: name of the file it runs; ``""`` for the float model.
        metrics: of the user's validation step, by name; empty where it did not run.
        agreement: share of a few validation samples whose class is the float model's, in [0, 1]; None where the network
            is no classifier, or there are no data.
        size_bytes: of the file, or of the float model's weights.
        latency: of one sample; None where the engine does not run it.
        batch: of a batch; None likewise.
        note: what did not work, or ``""``.
    """

    runtime: str
    file: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    size_bytes: int | None = None
    latency: Timing | None = None
    batch: Timing | None = None
    note: str = ""

    @property
    def title(self) -> str:
        """What it is called in tables."""
        return _TITLES[self.runtime]

    @property
    def is_float(self) -> bool:
        return self.runtime in (EAGER, FOLDED)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Engine:
        """The engine that :func:`dataclasses.asdict` gave, also by way of JSON."""
        timings = {key: Timing(**values[key]) for key in ("latency", "batch") if values.get(key) is not None}
        return cls(**{**values, **timings})


def recommended(engines: Sequence[Engine]) -> Engine | None:
    """The engine with the best median for one sample among those whose metrics are intact; None where none was timed.

    One of the float rows where no INT8 engine is faster, or none of the faster ones computes what it should.
    """
    times = {
        index: engine.latency.p50_ms
        for index, engine in enumerate(engines)
        if engine.latency is not None and (engine.is_float or _is_right(engine, engines))
    }
    return engines[min(times, key=times.__getitem__)] if times else None


def _is_right(engine: Engine, engines: Sequence[Engine]) -> bool:
    """Whether an engine's metrics are intact; of one that was not validated, whether it does as one does that was."""
    eager = _eager(engines)
    reference = {} if eager is None else eager.metrics
    if engine.metrics or not reference:
        return is_intact(reference, engine.metrics)
    for other in engines:
        if not other.is_float and other.metrics and is_intact(reference, other.metrics):
            both = engine.agreement, other.agreement
            if both[0] is not None and both[1] is not None and both[0] >= both[1] - METRIC_TOLERANCE:
                return True
    return False


def is_intact(reference: Mapping[str, float], metrics: Mapping[str, float]) -> bool:
    """Whether metrics are the float model's, within :data:`METRIC_TOLERANCE`; where none are known, they are.

    A loss is looked at where there is nothing else: it has no natural scale, and moves where no prediction does.
    """
    shared = [name for name in reference if name in metrics]
    judged = [name for name in shared if "loss" not in name.lower()] or shared
    return all(
        abs(metrics[name] - reference[name]) <= METRIC_TOLERANCE * max(1, abs(reference[name])) for name in judged
    )


def recommendation(engines: Sequence[Engine]) -> str:
    """What to run, in a sentence; ``""`` where nothing was timed."""
    chosen = recommended(engines)
    eager = _eager(engines)
    times = _speedup(chosen, eager)
    if chosen is None or times is None:
        return ""
    if chosen.is_float:
        return f"recommended: {chosen.title}: no INT8 engine here is faster with its metrics intact"
    metrics = ", metrics intact" if chosen.metrics else ""
    run = f"lq.load({chosen.file!r}, {chosen.runtime!r})"
    return f"recommended: {chosen.title}, {times:.1f}× faster than float for one sample{metrics}: {run}"


def cells(engines: Sequence[Engine], batch_size: int) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of engines; what is unknown of all has no column.

    Args:
        engines: rows.
        batch_size: samples in a batch.
    """
    eager = _eager(engines)
    names = list(dict.fromkeys(name for engine in engines for name in engine.metrics))[:_MOST_METRICS]
    headers = ["", *names, "agreement", "size", "p50, ms", f"/s, batch {batch_size}"]
    rows = []
    for engine in engines:
        one = engine.latency
        rows.append(
            [
                engine.title,
                *(_text(engine.metrics.get(name), ".4f") for name in names),
                _text(engine.agreement, ".2%"),
                "" if engine.size_bytes is None else file_size(engine.size_bytes),
                "" if one is None else f"{one.p50_ms:.3g}",
                "" if engine.batch is None else f"{engine.batch.throughput:,.0f}",
                "" if (times := _speedup(engine, eager)) is None else f"{times:.2f}×",
            ]
        )
    headers.append("speed-up")
    kept = [index for index in range(len(headers)) if index == 0 or any(row[index] for row in rows)]
    return [headers[index] for index in kept], [[row[index] for index in kept] for row in rows]


def notes(engines: Sequence[Engine]) -> list[str]:
    """What did not work, a line for each engine."""
    return [f"{engine.title}: {engine.note}" for engine in engines if engine.note]


def table(engines: Sequence[Engine], title: str, batch_size: int) -> Table:
    """A row for each engine, the recommended one in bold."""
    chosen = recommended(engines)
    headers, rows = cells(engines, batch_size)
    rich_table = Table(title=title)
    for index, header in enumerate(headers):
        rich_table.add_column(header, justify="right" if index else "left", no_wrap=index == 0)
    for engine, row in zip(engines, rows, strict=True):
        rich_table.add_row(*row, style="bold" if engine is chosen else "")
    return rich_table


def scalars(engines: Sequence[Engine]) -> dict[str, float]:
    """As flat numbers for loggers: ``engines/RUNTIME/NAME`` of each, and of the one that is recommended."""
    numbers: dict[str, float] = {}
    for engine in engines:
        named: dict[str, float | None] = {**engine.metrics, "agreement": engine.agreement}
        if engine.latency is not None:
            named["latency_p50_ms"] = engine.latency.p50_ms
        if engine.batch is not None:
            named["throughput"] = engine.batch.throughput
        if engine.size_bytes is not None:
            named["size_mb"] = engine.size_bytes / 1e6
        numbers |= {f"engines/{engine.runtime}/{name}": v for name, v in named.items() if v is not None}
    times = _speedup(recommended(engines), _eager(engines))
    if times is not None:
        numbers["speedup/recommended"] = times
    return numbers


def _eager(engines: Sequence[Engine]) -> Engine | None:
    return next((engine for engine in engines if engine.runtime == EAGER), None)


def _speedup(engine: Engine | None, eager: Engine | None) -> float | None:
    """How many times faster than float one sample is; None where one of the two was not timed."""
    if engine is None or engine.latency is None or eager is None or eager.latency is None:
        return None
    return eager.latency.p50_ms / engine.latency.p50_ms


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
