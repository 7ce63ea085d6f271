"""An INT8 network of parts that are called one by one, joined by what lies between them: one network again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_flatten_with_path

from lq.graph.parts import PARTS
from lq.int8.module import Int8Module
from lq.interface.guards import check_guards, fixes_the_batch, input_name

#: What the tensors that are read between the parts are called in the joined network.
_BETWEEN = "lq_between_{}"


def joined(
    int8: Int8Module,
    graph: fx.Graph,
    read: Callable[[str], Any],
    inputs: Mapping[str, Any],
    calls: Mapping[str, Any],
    guards: tuple[str, ...] = (),
) -> Int8Module:
    """One network of the parts of ``int8`` and of ``graph``, which calls them.

    It is for inputs of the size of ``inputs``, in batches of any size: what the parts ask of the sizes between them is
    not known of others.

    Args:
        int8: prepared as a :class:`~lq.graph.parts.PartsForward`, and converted. It is left as it is.
        graph: of ATen operators, with a call of each part by its path.
        read: gives the tensor that a ``get_attr`` node of ``graph`` reads.
        inputs: example inputs, by the names of its placeholders.
        calls: what ``graph`` gives each part for them, as ``[args, kwargs]`` by path.
        guards: the conditions on their sizes under which ``graph`` holds.

    Raises:
        ValueError: where a part takes one batch size alone, or other sizes than it is given.
    """
    for guard in filter(fixes_the_batch, int8.guards):
        raise ValueError(f"a part of the network takes batches of one size alone: {guard}")
    paths, _ = tree_flatten_with_path({PARTS: dict(calls)})
    check_guards(int8.guards, {input_name(way): value.shape for way, value in paths if isinstance(value, Tensor)})
    root = nn.Module()
    for name, child in int8.named_children():
        root.add_module(name, child)
    for name, parameter in int8.named_parameters(recurse=False):
        root.register_parameter(name, parameter)
    for name, buffer in int8.named_buffers(recurse=False):
        root.register_buffer(name, buffer)
    new = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = _BETWEEN.format(len(root._buffers))
            root.register_buffer(name, read(str(node.target)).detach().cpu().clone())
            values[node] = new.get_attr(name)
        elif node.op == "call_module":
            args, kwargs = _filled((node.args, node.kwargs), values)
            call = {PARTS: {str(node.target): [list(args), dict(kwargs)]}}
            values[node] = _copied(int8.graph, new, call)[str(node.target)]
        elif node.op == "output":
            new.output(_filled(node.args[0], values))
        else:
            values[node] = _copy(node, new, values)
    new.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    new.lint()
    network = Int8Module(root, new, int8.execution)
    network.example_inputs = dict(inputs)
    network.guards = tuple(dict.fromkeys((*guards, *_sizes(inputs))))
    network.report = int8.report
    return network


def _copied(graph: fx.Graph, into: fx.Graph, inputs: Mapping[str, Any]) -> Any:
    """Write the nodes of a part into another graph; what the part returns for ``inputs``, as nodes there."""
    (wanted,) = inputs[PARTS]
    values: dict[fx.Node, Any] = {}
    output: Any = None
    needed = _needed(graph, wanted)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "output":
            output = {wanted: _filled(node.args[0][wanted], values)}
        elif node in needed:
            values[node] = _copy(node, into, values)
    return output


def _needed(graph: fx.Graph, part: str) -> set[fx.Node]:
    """The nodes that a part's results are computed from: the others read the inputs of other parts."""
    results: Any = graph.output_node().args[0]
    waiting: list[fx.Node] = []
    map_aggregate(results[part], lambda value: waiting.append(value) if isinstance(value, fx.Node) else None)
    needed: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return needed


def _copy(node: fx.Node, into: fx.Graph, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "call_function" and node.target is operator.getitem:
        source, key = _filled(node.args, values)
        if not isinstance(source, fx.Node):
            return source[key]
    return into.node_copy(node, lambda each: values[each])


def _filled(structure: Any, values: Mapping[fx.Node, Any]) -> Any:
    return map_aggregate(structure, lambda value: values[value] if isinstance(value, fx.Node) else value)


def _sizes(inputs: Mapping[str, Any]) -> list[str]:
    paths, _ = tree_flatten_with_path(dict(inputs))
    tensors = [(input_name(path), value.shape) for path, value in paths]
    return [f"size({name!r}, {axis}) == {size}" for name, shape in tensors for axis, size in enumerate(shape) if axis]
