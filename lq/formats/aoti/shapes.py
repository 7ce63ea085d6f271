"""The shapes of an INT8 network's tensors."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lq.formats.pt2.write import examples
from lq.graph.interpret import node_values
from lq.int8.module import Int8Module


def shapes_of(model: Int8Module) -> dict[fx.Node, torch.Size]:
    """The shape of each tensor of the graph, for the example inputs."""
    values = node_values(model.graph, model, examples(model))
    return {node: value.shape for node, value in values.items() if isinstance(value, Tensor)}
