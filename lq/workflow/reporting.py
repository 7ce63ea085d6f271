"""What was quantized, with which scheme and range, and what stayed float and why."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx, nn

from lq.graph.analysis import GraphAnalysis
from lq.graph.ops import MOVES, OpKind, classify
from lq.graph.placement import Chain, Operator, site, source_of
from lq.numerics.quantizer import Quantizer
from lq.results.report import LayerReport, QuantizationReport
from lq.schemes.targets import Target
from lq.workflow.prepare import is_prepared, prepared_forward, quantizers


def _range(quantizer: Quantizer) -> str:
    if not quantizer.calibrated:
        return "no range yet"
    low, high = quantizer.quantized_range()
    if quantizer.spec.per_channel:
        reach = high.abs()
        return f"±{reach.min():.3g} to ±{reach.max():.3g}"
    return f"[{low:.3g}, {high:.3g}]"


_FLOAT_REASONS = {
    OpKind.CONV: "its input or weight has no INT8 form",
    OpKind.LINEAR: "its input or weight has no INT8 form",
    OpKind.BATCH_NORM: "no convolution or linear layer right before it to fold into",
    OpKind.AVG_POOL: "pooling averages in float, between an INT8 input and an INT8 output",
    OpKind.ADD: "none of its operands is a convolution's own output",
}

_NO_KERNEL = "no INT8 kernel for this operator"


def make_report(
    model: nn.Module,
    analysis: GraphAnalysis,
    quantizers: Mapping[str, Quantizer],
    target: Target,
    fold_difference: float | None = None,
) -> QuantizationReport:
    """The report of a prepared model, from its float graph."""
    layers = tuple(row for row, _ in report_rows(model, analysis, quantizers))
    return QuantizationReport(type(model).__name__, target.name, layers, fold_difference)


def report_rows(
    model: nn.Module, analysis: GraphAnalysis, quantizers: Mapping[str, Quantizer]
) -> list[tuple[LayerReport, fx.Node | None]]:
    """The rows of the report, each with its first node in the float graph, or None where that does not reach it."""
    placement = analysis.placement
    kernel_of = placement.kernel_of()
    layers: list[tuple[LayerReport, fx.Node | None]] = []
    for node in analysis.graph.nodes:
        kernel = kernel_of.get(node)
        if kernel is not None:
            if node is kernel.node:
                layers.append((_kernel_row(kernel, quantizers), node))
        elif _computes(node):
            kind = classify(node)
            name = site(node)
            layer = node.meta["layer"]
            path = name if layer is None else layer  # a module's second call has a name of its own
            if node.op == "call_module" and layer is None:  # what it returns has another name
                name = path = str(node.target)
            reason = placement.float_layers.get(path, _FLOAT_REASONS.get(kind, _NO_KERNEL))
            layers.append((LayerReport(name, operator_label(node, model), "float", reason=reason), node))
    calls = [node for node in analysis.graph.nodes if node.op.startswith("call")]
    reached = {str(node.target) if node.op == "call_module" else node.meta["path"] for node in calls}
    for name, module in model.named_modules():
        owner_reached = any(name == path or name.startswith(f"{path}.") for path in reached)
        chain_names = {chain.name for chain in placement.chains}
        if isinstance(module, nn.Conv2d | nn.Linear) and not owner_reached and name not in chain_names:
            row = LayerReport(name, type(module).__name__, "float", reason="the forward does not reach it")
            layers.append((row, None))
    return layers


def _kernel_row(kernel: Chain | Operator, quantizers: Mapping[str, Quantizer]) -> LayerReport:
    weight = ""
    if isinstance(kernel, Chain):
        quantizer = quantizers[kernel.weight_key]
        weight = f"{quantizer.spec}, {_range(quantizer)}"
    first = kernel.reads[:1] if isinstance(kernel, Chain) else kernel.reads
    sources = [name for operand in first if (name := site(source_of(operand))) in quantizers]
    return LayerReport(
        name=kernel.name,
        kind=" + ".join(classify(node).value for node in kernel.nodes),
        precision="int8",
        weight=weight,
        input="; ".join(f"{name}: {quantizers[name].spec}, {_range(quantizers[name])}" for name in sources),
        output=site(kernel.end),
    )


def operator_label(node: fx.Node, model: nn.Module) -> str:
    """What a node computes, for people to read: the class of the layer whose output it is, else the function's name."""
    layer = node.meta["layer"]
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if layer is not None and site(node).rpartition(".")[2] != node.meta["name"]:
        return type(model.get_submodule(layer)).__name__
    return str(node.meta["name"])


def _computes(node: fx.Node) -> bool:
    """Whether a node does arithmetic worth a row: it neither moves values nor reads a shape."""
    if node.op not in ("call_module", "call_function"):
        return False
    return classify(node) not in (*MOVES, OpKind.SHAPE) and node.target is not operator.getitem


def report(model: nn.Module) -> QuantizationReport:
    """The report of a prepared model, or of an INT8 module.

    Raises:
        ValueError: where ``model`` is neither.
    """
    converted = getattr(model, "report", None)
    if isinstance(converted, QuantizationReport):
        return converted
    if not is_prepared(model):
        raise ValueError(f"this {type(model).__name__} is neither prepared by lq.prepare nor converted by lq.convert")
    forward = prepared_forward(model)
    return make_report(model, forward.analyze(), quantizers(model), forward.target)
