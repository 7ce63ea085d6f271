"""Max pools as Inductor's INT8 pool computes them correctly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from lq.formats.aoti.shapes import shapes_of
from lq.graph.ops import argument
from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_BUFFER
from lq.int8.module import Int8Module

aten = torch.ops.aten


def without_ceil_mode(model: Int8Module) -> Int8Module:
    """``model`` with equivalent max pools in place of those with ``ceil_mode=True``.

    Inductor's pass for INT8 pools loses that argument (torch 2.14), and what comes out is a row and a column short. A
    border of the grid's lowest integer, which no window chooses over a pixel, makes as many windows without it.
    """
    if not any(_rounds_up(node) for node in model.graph.nodes):
        return model
    adjusted = copy.deepcopy(model)
    shapes = shapes_of(adjusted)
    for node in list(adjusted.graph.nodes):
        if _rounds_up(node):
            _pool_with_border(adjusted.graph, node, shapes)
    return adjusted


def _rounds_up(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not aten.max_pool2d.default:
        return False
    source: Any = node.args[0]
    return bool(argument(node, 5, "ceil_mode", False)) and source.target in (DEQUANTIZE, DEQUANTIZE_BUFFER)


def _pool_with_border(graph: fx.Graph, node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> None:
    dequantize: Any = node.args[0]
    kernel = _pair(node.args[1])
    stride = _pair(argument(node, 2, "stride", None) or kernel)
    padding, dilation = _pair(argument(node, 3, "padding", 0)), _pair(argument(node, 4, "dilation", 1))
    border = []
    for axis in (1, 0):  # the last axis first, as padding is written
        windows, size = shapes[node][2 + axis], shapes[dequantize][2 + axis]
        reach = (windows - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        border += [0, max(0, reach - size - 2 * padding[axis])]
    lowest = dequantize.args[3]
    with graph.inserting_before(node):
        integers = dequantize.args[0]
        if any(border):
            integers = graph.call_function(aten.constant_pad_nd.default, (integers, border, lowest))
        bordered = graph.call_function(dequantize.target, (integers, *dequantize.args[1:]))
    node.args = (bordered, kernel, stride, padding, dilation)
    node.kwargs = {}


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
