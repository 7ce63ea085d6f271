"""The network as TensorBoard draws it, with what runs in INT8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from torch import Tensor, fx, nn

from lq.graph.analysis import GraphAnalysis
from lq.graph.ops import MOVES, classify
from lq.graph.placement import site, source_of
from lq.numerics.quantizer import Quantizer
from lq.workflow.reporting import operator_label


def model_graph(graph: GraphAnalysis, root: nn.Module, activations: Mapping[str, Quantizer]) -> GraphDef:
    """The float graph, each node with the precision it runs in: in its attributes, and as its device.

    TensorBoard colours nodes by device, so "Color: Device" shows INT8 and float; its boxes are the model's modules.

    Args:
        graph: with its placement.
        root: the module it is of.
        activations: quantizers of tensors, by the names of what makes them.
    """
    placement = graph.placement
    kernels = {node for kernel in placement.kernels for node in kernel.nodes}
    quantized = set(placement.activations)

    def in_int8(node: fx.Node) -> bool:
        return node in kernels or (classify(node) in MOVES and source_of(node) in quantized)

    nodes = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            continue  # weights: a picture of what flows
        precision = "int8" if in_int8(node) else "float"
        attributes = {"precision": _text(precision)}
        if site(node) in activations:
            quantizer = activations[site(node)]
            low, high = (float(end) for end in quantizer.quantized_range())
            attributes["quantized_to"] = _text(f"{quantizer.spec}, [{low:.4g}, {high:.4g}]")
        reason = placement.float_layers.get(node.meta["layer"] or site(node))
        if reason is not None:
            attributes["why_float"] = _text(reason)
        value = graph.values.get(node)
        if isinstance(value, Tensor):
            shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in value.shape])
            attributes["_output_shapes"] = AttrValue(list=AttrValue.ListValue(shape=[shape]))
        nodes.append(
            NodeDef(
                name=_path(node),
                op=_operator(node, root),
                input=[_path(source) for source in node.all_input_nodes if source.op != "get_attr"],
                device=f"/device:{precision.upper()}:0",
                attr=attributes,
            )
        )
    return GraphDef(node=nodes)


def _path(node: fx.Node) -> str:
    return site(node).replace(".", "/")


def _operator(node: fx.Node, root: nn.Module) -> str:
    return operator_label(node, root) if node.op.startswith("call") else node.op


def _text(value: Any) -> AttrValue:
    return AttrValue(s=str(value).encode())
