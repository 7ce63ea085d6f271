"""A graph as values that pickle: torch's own does not, because of its operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket


@dataclass(frozen=True)
class _Operator:
    """One of torch's operators, by its path in ``torch.ops``."""

    path: tuple[str, ...]

    def find(self) -> Any:
        member: Any = torch.ops
        for name in self.path:
            member = getattr(member, name)
        return member


@dataclass(frozen=True)
class _Reference:
    """Another node, by its place in the graph."""

    index: int


def graph_state(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Plain values from which :func:`graph_from_state` rebuilds the graph, without the nodes' ``meta``."""
    places = {node: index for index, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        return _Reference(places[value]) if isinstance(value, fx.Node) else _by_name(value)

    return [
        (node.op, node.name, _by_name(node.target), *(fx.node.map_aggregate(each, plain) for each in _arguments(node)))
        for node in graph.nodes
    ]


def graph_from_state(state: list[tuple[Any, ...]]) -> fx.Graph:
    """The graph from the values that :func:`graph_state` gave."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def restored(value: Any) -> Any:
        return nodes[value.index] if isinstance(value, _Reference) else _resolved(value)

    for op, name, target, args, kwargs in state:
        args, kwargs = (fx.node.map_aggregate(each, restored) for each in (args, kwargs))
        nodes.append(graph.create_node(op, _resolved(target), args, kwargs, name))
    graph.lint()
    return graph


def _arguments(node: fx.Node) -> tuple[Any, Any]:
    return node.args, node.kwargs


def _by_name(value: Any) -> Any:
    match value:
        case OpOverload():
            namespace, _, name = value._schema.name.partition("::")
            return _Operator((namespace, name, value._overloadname))
        case OpOverloadPacket():
            return _Operator(tuple(value._qualified_op_name.split("::")))
        case HigherOrderOperator():
            return _Operator((value.namespace or "higher_order", value.name()))
    return value


def _resolved(value: Any) -> Any:
    return value.find() if isinstance(value, _Operator) else value
