"""Sums as torchao's passes for Inductor compile them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from lq.graph.ops import OpKind, classify
from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_BUFFER
from lq.int8.module import Int8Module

aten = torch.ops.aten


def without_sums_after_activations(model: Int8Module) -> Int8Module:
    """``model`` with ``y - (-act(conv(x)))`` in place of ``y + act(conv(x))``, which is the same number.

    Once the activation is in the convolution's kernel, torchao 0.18 takes that and a sum for a convolution and a sum,
    and fails on the assertion that there is no activation yet. Which activations that are, and in how many operators
    they may be written, is for its passes to say: here they are all that is computed in float, and no kernel's very
    output.
    """
    if not any(_computed_in_float(node) for node in model.graph.nodes):
        return model
    adjusted = copy.deepcopy(model)
    for node in list(adjusted.graph.nodes):
        activation = _computed_in_float(node)
        if activation is not None:
            (other,) = (operand for operand in node.args if operand is not activation)
            with adjusted.graph.inserting_before(node):
                negative = adjusted.graph.call_function(aten.neg.default, (activation,))
                difference = adjusted.graph.call_function(aten.sub.Tensor, (other, negative))
            node.replace_all_uses_with(difference)
            adjusted.graph.erase_node(node)
    return adjusted


def _computed_in_float(node: fx.Node) -> fx.Node | None:
    """The operand of a sum that may be an activation; None where a kernel's output is one, which may do the sum."""
    if node.target is not aten.add.Tensor or classify(node) is not OpKind.ADD or node.args[0] is node.args[1]:
        return None
    operands: Any = node.args
    if any(classify(operand) in (OpKind.CONV, OpKind.LINEAR) for operand in operands):
        return None
    computed = (operand for operand in operands if isinstance(operand.target, torch._ops.OpOverload))
    passed = (DEQUANTIZE, DEQUANTIZE_BUFFER)
    return next((n for n in computed if n.target not in passed and classify(n) is not OpKind.SHAPE), None)
