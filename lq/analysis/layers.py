"""What rounding does to the weight, the input and the output of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lq.analysis.measures import Likeness, is_float_tensor
from lq.analysis.rounding import Roundings, rounded
from lq.analysis.simulation import Values
from lq.graph.analysis import GraphAnalysis
from lq.graph.folding import BatchNormStatistics, fold
from lq.graph.ops import WEIGHTED_MODULES, weighted_op
from lq.graph.placement import Chain, Operator
from lq.numerics.quantizer import Quantizer
from lq.results.report import LayerReport


@dataclass
class InputStatistics:
    """An input's values against the range of its quantizer, over all batches.

    Args:
        node: whose value it is.
        quantizer: the grid.
        rounded: the value, and what rounding and clipping alone make of it.
    """

    node: fx.Node
    quantizer: Quantizer
    rounded: Likeness = field(default_factory=Likeness)
    low: float = float("inf")
    high: float = float("-inf")
    outside: int = 0
    count: int = 0

    def add(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        quantizer = self.quantizer
        self.rounded.add(x, rounded(x, quantizer))
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        # Half a step off the grid is no more than rounding does: the same count as in `lq.ranges`.
        first, last = (float(bound) for bound in quantizer.quantized_range())
        half = float(quantizer.scale) / 2
        self.outside += int(((x < first - half) | (x > last + half)).sum())
        self.count += x.numel()

    def figures(self) -> dict[str, Any]:
        """The fields of a :class:`~lq.LayerAnalysis` that these statistics fill."""
        low, high = self.quantizer.quantized_range()
        return {
            "input_sqnr_db": self.rounded.sqnr_db,
            "clipped": self.outside / self.count if self.count else None,
            "range": (float(low), float(high)),
            "observed": (self.low, self.high) if self.rounded.sqnr_db is not None else None,
        }


@dataclass
class Layer:
    """A row of the report and what is measured of it.

    Args:
        row: its name, kind, precision and reason.
        node: its first node in the float graph; None where the forward does not reach it.
        kernel: what runs in INT8, or None.
    """

    row: LayerReport
    node: fx.Node | None
    kernel: Chain | Operator | None
    inputs: list[InputStatistics] = field(default_factory=list)
    output: Likeness = field(default_factory=Likeness)

    @property
    def end(self) -> fx.Node | None:
        """The node whose value leaves it."""
        return self.node if self.kernel is None else self.kernel.end

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its nodes in the float graph."""
        if isinstance(self.kernel, Chain):
            return self.kernel.nodes
        return tuple(dict.fromkeys(n for n in (self.node, self.end) if n is not None))

    def input_figures(self) -> dict[str, Any]:
        """Of an add, those of the operand that suffers most from its rounding."""
        figures = [statistics.figures() for statistics in self.inputs]
        return min(figures, key=lambda operand: _or_infinity(operand["input_sqnr_db"]), default={})


def _or_infinity(value: float | None) -> float:
    return float("inf") if value is None else value


def layers_of(
    rows: list[tuple[LayerReport, fx.Node | None]], analysis: GraphAnalysis, roundings: Roundings
) -> list[Layer]:
    """The layers of a model, in the order of its report."""
    kernels = {kernel.node: kernel for kernel in analysis.placement.kernels}
    layers = []
    for row, node in rows:
        kernel = None if node is None else kernels.get(node)
        read = kernel.reads if isinstance(kernel, Operator) else [] if kernel is None else kernel.reads[:1]
        inputs = [InputStatistics(node, quantizer) for node in read if (quantizer := roundings.of(node)) is not None]
        layers.append(Layer(row, node, kernel, inputs))
    return layers


def watch_outputs(layers: list[Layer], floats: Values) -> dict[fx.Node, Callable[[Any], None]]:
    """For a run of the INT8 model: compares what each layer makes with what it makes in the float model."""

    def comparing(layer: Layer, node: fx.Node) -> Callable[[Any], None]:
        def compare(value: Any) -> None:
            reference = floats.read[node]
            if is_float_tensor(reference) and is_float_tensor(value) and reference.shape == value.shape:
                layer.output.add(reference, value)

        return compare

    return {layer.end: comparing(layer, layer.end) for layer in layers if layer.end is not None}


def weight_figures(chain: Chain, analysis: GraphAnalysis, roundings: Roundings) -> dict[str, Any]:
    """SQNR of a weight, with batch norm folded: channels are weighted as they are in the layer's output."""
    norm = None if chain.batch_norm is None else BatchNormStatistics.of(chain.batch_norm, analysis.values)
    quantizer = roundings.weight_quantizers[chain.weight_key]
    folded = fold(roundings.weight(chain), None, norm, quantizer)
    assert folded.weight_int is not None and folded.weight_scale is not None
    column = folded.weight_scale.reshape(-1, *[1] * (folded.weight.dim() - 1))
    likeness = Likeness()
    likeness.add(folded.weight, folded.weight_int * column)
    return {"weight_sqnr_db": likeness.sqnr_db}


def elements(model: nn.Module, layer: Layer, analysis: GraphAnalysis) -> dict[str, int]:
    """How many a layer's weight and bias have, and its weight alone (0 unless it is a convolution or linear layer)."""
    op = None if layer.node is None else weighted_op(layer.node)
    if op is not None:
        tensors = [analysis.values[op.weight], None if op.bias is None else analysis.values[op.bias]]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
        return {"parameters": sum(sizes), "weights": sizes[0]}
    name = layer.row.name if layer.node is None else layer.node.meta["layer"]
    if name is None or (layer.node is not None and layer.row.kind == layer.node.meta["name"]):
        return {}
    module: Any = model.get_submodule(name)
    parameters = sum(p.numel() for p in module.parameters())
    if isinstance(module, WEIGHTED_MODULES):
        weight: Any = module.weight
        return {"parameters": parameters, "weights": weight.numel()}
    return {"parameters": parameters}
