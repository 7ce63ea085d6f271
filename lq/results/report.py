"""The report of a model's layers: which run in INT8, which in float and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from rich.table import Table

from lq.util.display import as_text

#: A row of a table of layers, a dataclass.
L = TypeVar("L", bound=Any)

#: A layer counts as slower in INT8 from this ratio of times on: measurements vary by a tenth.
SLOWER = 1.1


@dataclass(frozen=True)
class LayerReport:
    """One row of the report.

    Args:
        name: the layer's path in the module.
        kind: what it is, with what is fused into it: ``"conv + batch_norm + add + relu"``.
        precision: ``"int8"`` or ``"float"``.
        weight: scheme and range of the weight, or ``""``.
        input: name, scheme and range of the input's quantizer, or ``""``.
        reason: why it stays float, or ``""``.
        output: name of the tensor that leaves it, or ``""``.
        in_process: what PyTorch's kernels on this machine still compute in float and why, or ``""``; known
            once the INT8 module has run.
        float_ms: time of one sample in the float model in PyTorch on this machine's CPU, milliseconds; None where that
            was not measured.
        int8_ms: likewise in the INT8 network in process.
    """

    name: str
    kind: str
    precision: str
    weight: str = ""
    input: str = ""
    reason: str = ""
    output: str = ""
    in_process: str = ""
    float_ms: float | None = None
    int8_ms: float | None = None

    @property
    def is_slower(self) -> bool:
        """Whether its INT8 kernel takes longer than the float layer, by more than :data:`SLOWER` times."""
        known = self.precision == "int8" and self.float_ms is not None and self.int8_ms is not None
        return known and self.int8_ms > SLOWER * self.float_ms  # type: ignore[operator]

    @property
    def note(self) -> str:
        """Why it stays in float, or what its INT8 kernel does not do for it; ``""`` if there is nothing to note."""
        slower = f"slower than float: {self.int8_ms:.3g} ms, float {self.float_ms:.3g} ms" if self.is_slower else ""
        return "; ".join(text for text in (self.reason or self.in_process, slower) if text)


@dataclass(frozen=True)
class QuantizationReport:
    """What quantization did to a model, layer by layer; ``str(report)`` is a table.

    Args:
        model: class name of the model.
        target: name of the target.
        layers: in the order of the graph.
        fold_difference: the largest relative difference that folding batch norm made, or None before conversion.
    """

    model: str
    target: str
    layers: tuple[LayerReport, ...]
    fold_difference: float | None = None

    @property
    def int8_layers(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.precision == "int8")

    @property
    def float_layers(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.precision == "float")

    @property
    def slower_layers(self) -> tuple[LayerReport, ...]:
        """Those whose INT8 kernel is slower than the float layer it replaces, the largest slowdown first."""
        slower = [layer for layer in self.layers if layer.is_slower]
        return tuple(sorted(slower, key=lambda layer: (layer.float_ms or 0.0) - (layer.int8_ms or 0.0)))

    def with_times(self, times: Sequence[Mapping[str, float]]) -> QuantizationReport:
        """The report with ``float_ms`` and ``int8_ms`` of each layer, as far as they are there, in order."""
        return replace(self, layers=timed(self.layers, times))

    def as_it_ran(self, unfused: Mapping[str, str]) -> QuantizationReport:
        """The report with what the kernels compute in float.

        Args:
            unfused: why, by the names of the tensors.
        """
        layers = tuple(
            replace(layer, in_process=unfused[layer.output]) if layer.output in unfused else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationReport:
        """The report that :meth:`to_dict` gave."""
        return cls(**{**values, "layers": tuple(LayerReport(**layer) for layer in values["layers"])})

    def table(self) -> Table:
        title = f"{self.model} for {self.target}: {len(self.int8_layers)} layers in INT8"
        if self.float_layers:
            title += f", {len(self.float_layers)} in float"
        table = Table(title=title)
        for header in ("layer", "operators", "runs in", "weight", "input (quantizer, range)", "why float, or slower"):
            table.add_column(header, overflow="fold")
        for layer in self.layers:
            table.add_row(layer.name, layer.kind, layer.precision, layer.weight, layer.input, layer.note)
        if self.fold_difference is not None:
            table.caption = f"largest relative difference from folding batch norm: {self.fold_difference:.1e}"
        return table

    def __str__(self) -> str:
        return as_text(self.table(), 150)


def timed(layers: Sequence[L], times: Sequence[Mapping[str, float]]) -> tuple[L, ...]:
    """Rows of layers with their ``float_ms`` and ``int8_ms``, as far as they are there, in order."""
    return tuple(
        replace(layer, float_ms=measured.get("float_ms"), int8_ms=measured.get("int8_ms"))
        for layer, measured in zip(layers, times, strict=True)
    )


def slower_text(layers: Sequence[LayerReport], limit: int = 3) -> str:
    """A message that INT8 is slower than float in these layers, the first few by name."""
    named = ", ".join(
        f"{layer.name} ({layer.int8_ms:.3g} ms, float {layer.float_ms:.3g} ms)" for layer in layers[:limit]
    )
    more = f" and {len(layers) - limit} more" if len(layers) > limit else ""
    return f"slower in INT8 in process than in float: {named}{more}"
