"""The quantize and dequantize operators of a converted graph, with scales as buffers or as constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx, nn

_ops = torch.ops.quantized_decomposed

#: With scale and zero point as tensors: what a module's state dict holds.
QUANTIZE_BUFFER = _ops.quantize_per_tensor.tensor
DEQUANTIZE_BUFFER = _ops.dequantize_per_tensor.tensor

#: With both as numbers: what kernels, exporters and compilers need.
QUANTIZE = _ops.quantize_per_tensor.default
DEQUANTIZE = _ops.dequantize_per_tensor.default

DEQUANTIZE_WEIGHT = _ops.dequantize_per_channel.default


@dataclass(frozen=True)
class Grid:
    """Arguments after the tensor of a per-tensor quantize or dequantize node: all numbers."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @classmethod
    def of(cls, node: fx.Node) -> Grid:
        """The grid of a :data:`QUANTIZE` or :data:`DEQUANTIZE` node."""
        return cls(*node.args[1:6])  # type: ignore[arg-type]

    def unsigned(self) -> Grid:
        """The same real values as uint8: an int8 grid with every integer 128 higher."""
        if self.dtype is torch.uint8:
            return self
        shifted = (self.zero_point + 128, self.quant_min + 128, self.quant_max + 128)
        return Grid(self.scale, *shifted, torch.uint8)


def lookup(root: nn.Module, target: str) -> Any:
    """The attribute of ``root`` that a ``get_attr`` node reads."""
    path, _, name = target.rpartition(".")
    return getattr(root.get_submodule(path), name)


def mark_origin(graph: fx.Graph, name: str | None) -> None:
    """Note in the nodes written last which tensor of the float graph they are for; :func:`origin` reads it."""
    for node in reversed(graph.nodes):
        if "origin" in node.meta:
            return
        node.meta["origin"] = name


def origin(node: fx.Node) -> str | None:
    """The tensor of the float graph (a node's ``meta["site"]``) that ``node`` of an INT8 graph was written for.

    A kernel's nodes are for the tensor that leaves it. None where the graph came from a file.
    """
    name: str | None = node.meta.get("origin")
    return name


def constant_qparams(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """A copy of ``graph`` in which every per-tensor scale and zero point is the number its buffer holds now."""
    copy = fx.Graph()
    output = copy.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    copy.output(output[0])
    constant = {QUANTIZE_BUFFER: QUANTIZE, DEQUANTIZE_BUFFER: DEQUANTIZE}
    for node in copy.nodes:
        if node.op == "call_function" and node.target in constant:
            x, scale, zero_point, *rest = node.args
            node.args = (x, lookup(root, scale.target).item(), lookup(root, zero_point.target).item(), *rest)
            node.target = constant[node.target]
    for node in reversed(list(copy.nodes)):
        if node.op == "get_attr" and not node.users:
            copy.erase_node(node)
    copy.lint()
    return copy
