"""Running a graph node by node to see every value in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from lq.graph.qdq import lookup


def run_node(node: fx.Node, read: Callable[[fx.Node], Any], root: nn.Module, attribute: Callable[[str], Any]) -> Any:
    """The value of a node that is not a placeholder.

    Args:
        node: the node.
        read: gives the value of each node that it reads.
        root: the module whose submodules it calls.
        attribute: gives what a ``get_attr`` node reads.
    """
    if node.op == "get_attr":
        return attribute(str(node.target))
    args: Any = map_arg(node.args, read)
    kwargs: Any = map_arg(node.kwargs, read)
    if node.op == "output":
        return args[0]
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


@torch.no_grad()
def node_values(
    graph: fx.Graph,
    root: nn.Module,
    inputs: Mapping[str, Any],
    attribute: Callable[[str], Any] | None = None,
    into: dict[fx.Node, Any] | None = None,
    instead: Mapping[fx.Node, Any] | None = None,
) -> dict[fx.Node, Any]:
    """The value of each node for one set of inputs.

    Args:
        graph: a graph without writes.
        root: the module whose attributes it reads.
        inputs: the placeholders' values, in their order.
        attribute: gives what a ``get_attr`` node reads; by default the attribute of ``root``.
        into: where the values are put; after an error it holds the values before it.
        instead: what the readers of a node are given in place of its value.
    """
    values = {} if into is None else into
    replaced = {} if instead is None else instead

    def read(node: fx.Node) -> Any:
        return replaced[node] if node in replaced else values[node]

    given = iter(inputs.values())
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        else:
            values[node] = run_node(node, read, root, attribute or (lambda name: lookup(root, name)))
    return values


def output_of(graph: fx.Graph) -> fx.Node:
    """The output node."""
    output: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return output
