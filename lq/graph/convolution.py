"""Convolutions as they stand in a converted graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

#: The operator, by the number of spatial axes.
CONVOLUTIONS = {dims: getattr(torch.ops.aten, f"conv{dims}d").default for dims in (1, 2, 3)}

_DIMS = {operator: dims for dims, operator in CONVOLUTIONS.items()}


def is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _DIMS


def conv_settings(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding and dilation of each spatial axis, and the number of groups, of a convolution."""
    dims = _DIMS[node.target]
    defaults: tuple[Any, ...] = ([1] * dims, [0] * dims, [1] * dims, 1)
    given: tuple[Any, ...] = tuple(node.args[3:])
    stride, padding, dilation, groups = (*given, *defaults[len(given) :])
    return list(stride), list(padding), list(dilation), int(groups)
