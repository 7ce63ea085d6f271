"""INT8 kernels against exact arithmetic, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE, Grid, constant_qparams
from lq.int8.module import Int8Module
from lq.int8.onednn import lower

#: Float32 has 24 bits. An integer takes 8 of them, and what a sum of products and its bias cancel the next 6.
STEP_ERROR = 2.0**-10


class _Exact(fx.Interpreter):
    """The simulation in float64, each layer given the integers that the kernels gave it.

    ``off`` has, for each quantize node, how far the kernels' integers are from the values before rounding, in steps.
    """

    def __init__(self, int8: Int8Module, graph: fx.Graph, integers: dict[str, Tensor]) -> None:
        super().__init__(copy.deepcopy(int8).double(), graph=graph)
        self.integers = integers
        self.off: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_function" and n.target is QUANTIZE:
            grid = Grid.of(n)
            value = (args[0] / grid.scale + grid.zero_point).clamp(grid.quant_min, grid.quant_max)
            integers = self.integers[n.name].int() - (128 if grid.dtype is torch.int8 else 0)
            self.off[n.name] = (integers - value).abs()
            return integers
        if n.op == "call_function" and n.target is DEQUANTIZE:
            grid = Grid.of(n)
            return (args[0].double() - grid.zero_point) * grid.scale
        if n.op == "call_function" and n.target is DEQUANTIZE_WEIGHT:
            weight, scale = args[:2]
            return weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
        return super().run_node(n)


def assert_kernels_are_exact(int8: Int8Module, *inputs: Any) -> None:
    """Each integer of each layer is the nearest to what the layer's integers give in float64, and so are the outputs.

    Two that are as near, but for what float32 cannot tell, are both right.
    """
    graph = constant_qparams(int8.graph, int8)
    integers: dict[str, Tensor] = {}

    def watch(node: fx.Node, computed: Tensor) -> Tensor:
        integers[node.name] = computed.contiguous().clone()  # views are taken as in the float model
        return computed

    outputs = lower(graph, int8, inputs, watch).outputs
    exact = _Exact(int8, graph, integers)
    doubles = [tree_map(lambda v: v.double() if v.is_floating_point() else v, value) for value in inputs]
    with torch.no_grad():
        expected = exact.run(*doubles)
    for name, off in exact.off.items():
        assert off.max() <= 0.5 + STEP_ERROR, f"{name}: {off.max():.4f} steps"
    for actual, wanted in zip(tree_leaves(outputs), tree_leaves(expected), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
