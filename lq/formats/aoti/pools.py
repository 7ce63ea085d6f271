"""Max pools as Inductor's INT8 pool computes them correctly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from lq.formats.aoti.shapes import shapes_of
from lq.graph.ops import argument, per_axis
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
    """Whether ``node`` is such a pool of integers, and nobody reads where the values were found."""
    if node.op != "call_function" or not argument(node, 5, "ceil_mode", False):
        return False
    if node.target is aten.max_pool2d_with_indices.default:
        is_pool = all(user.args[1] == 0 for user in node.users)
    else:
        is_pool = node.target is aten.max_pool2d.default
    source: Any = node.args[0]
    return is_pool and source.target in (DEQUANTIZE, DEQUANTIZE_BUFFER)


def _pool_with_border(graph: fx.Graph, node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> None:
    dequantize: Any = node.args[0]
    kernel = per_axis(node.args[1], 2)
    stride = per_axis(argument(node, 2, "stride") or kernel, 2)
    padding, dilation = per_axis(argument(node, 3, "padding", 0), 2), per_axis(argument(node, 4, "dilation", 1), 2)
    windows = shapes[node if node in shapes else next(iter(node.users))]
    border: list[int] = []
    for axis in (1, 0):  # the last axis first, as padding is written
        reach = (windows[2 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        border += [0, max(0, reach - shapes[dequantize][2 + axis] - 2 * padding[axis])]
    if any(border):
        integers, *grid = dequantize.args
        with graph.inserting_before(node):
            bordered = graph.call_function(aten.constant_pad_nd.default, (integers, border, grid[2]))
            dequantize = graph.call_function(dequantize.target, (bordered, *grid))
    node.args = (dequantize, *map(list, (kernel, stride, padding, dilation)))
    node.kwargs = {}
