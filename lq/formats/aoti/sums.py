"""Sums as torchao's passes for Inductor compile them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from lq.graph.qdq import DEQUANTIZE_WEIGHT
from lq.int8.module import Int8Module

aten = torch.ops.aten

#: Activations that the passes fuse into the kernel before them.
_ACTIVATIONS = (
    *(aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default),
    *(aten.silu.default, aten.hardswish.default, aten.gelu.default, aten.tanh.default),
)

_WEIGHTED = (aten.conv2d.default, aten.linear.default)


def without_sums_after_activations(model: Int8Module) -> Int8Module:
    """``model`` with ``y - (-act(conv(x)))`` in place of ``y + act(conv(x))``, which is the same number.

    Once the activation is in the convolution's kernel, torchao 0.18 takes that and a sum for a convolution and a sum,
    and fails on the assertion that there is no activation yet.
    """
    if not any(_after_activation(node) for node in model.graph.nodes):
        return model
    adjusted = copy.deepcopy(model)
    for node in list(adjusted.graph.nodes):
        activation = _after_activation(node)
        if activation is not None:
            (other,) = (operand for operand in node.args if operand is not activation)
            with adjusted.graph.inserting_before(node):
                negative = adjusted.graph.call_function(aten.neg.default, (activation,))
                difference = adjusted.graph.call_function(aten.sub.Tensor, (other, negative))
            node.replace_all_uses_with(difference)
            adjusted.graph.erase_node(node)
    return adjusted


def _after_activation(node: fx.Node) -> fx.Node | None:
    """The operand of a sum that is an activation of an INT8 kernel's results."""
    if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    if node.args[0] is node.args[1] or not all(isinstance(operand, fx.Node) for operand in node.args):
        return None
    operands: Any = node.args
    for operand in operands:
        if operand.target in _ACTIVATIONS and operand.args[0].target in _WEIGHTED:
            weight = operand.args[0].args[1]
            if weight.target is DEQUANTIZE_WEIGHT:
                return operand  # type: ignore[no-any-return]
    return None
