"""The shapes of an INT8 network's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lq.formats.pt2.write import examples
from lq.int8.module import Int8Module


class _Shapes(fx.Interpreter):
    def __init__(self, model: Int8Module) -> None:
        super().__init__(model)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


def shapes_of(model: Int8Module) -> dict[fx.Node, torch.Size]:
    """The shape of each tensor of the graph, for the example inputs."""
    shapes = _Shapes(model)
    with torch.no_grad():
        shapes.run(*examples(model).values())
    return shapes.shapes
