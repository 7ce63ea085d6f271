"""A graph that is run as it is written: each node's value exists once the node does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from lq.graph.qdq import lookup

#: Where the graph finds the module that it reads.
MODULE = "module"


def mapped(arguments: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    """The arguments with each node replaced by what ``value_of`` gives, in containers that can be written to."""
    if isinstance(arguments, fx.Node):
        return value_of(arguments)
    if isinstance(arguments, dict):
        return {key: mapped(value, value_of) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [mapped(value, value_of) for value in arguments]
    if isinstance(arguments, tuple):
        items = [mapped(value, value_of) for value in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else tuple(items)
    if isinstance(arguments, slice):
        return slice(*(mapped(end, value_of) for end in (arguments.start, arguments.stop, arguments.step)))
    return arguments


class Recording:
    """Writes a graph and runs each node of it as it is written.

    Args:
        root: the module that the graph reads, as ``self.module``.
        inputs: the values of its placeholders.

    Attributes:
        graph: what was written.
        constants: the tensors that it reads beside the module's, by attribute name.
        values: of the nodes that are still needed.
    """

    def __init__(self, root: nn.Module, inputs: Sequence[Any]) -> None:
        self.root = root
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self._inputs = iter(inputs)
        self._new: list[fx.Node] = []

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        return self._run(self.graph.call_function(target, args, kwargs))

    def constant(self, name: str, value: Any) -> fx.Node:
        self.constants[name] = value
        return self._run(self.graph.get_attr(name))

    def copy(self, node: fx.Node, read: Callable[[fx.Node], fx.Node], target: Any = None) -> fx.Node:
        """A node of a graph that reads the module itself.

        Args:
            node: the node.
            read: gives the node of this graph for each that it reads.
            target: what it calls, instead of its own target.
        """
        copied = self.graph.node_copy(node, read)
        copied.meta = {}
        copied.target = copied.target if target is None else target
        if node.op in ("get_attr", "call_module"):
            copied.target = f"{MODULE}.{node.target}"
        return copied if node.op == "output" else self._run(copied)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[node].shape)

    def keep(self, node: fx.Node | None) -> None:
        """Drop the values of all nodes since the last call but this one."""
        for new in self._new:
            if new is not node:
                self.values.pop(new, None)
        self._new.clear()

    def _run(self, node: fx.Node) -> fx.Node:
        args, kwargs = (mapped(given, self.values.__getitem__) for given in (node.args, dict(node.kwargs)))
        target: Any = node.target
        if node.op == "placeholder":
            value = next(self._inputs)
        elif node.op == "call_function":
            value = target(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], target)(*args[1:], **kwargs)
        elif node.op == "call_module":
            value = self.root.get_submodule(target.removeprefix(f"{MODULE}."))(*args, **kwargs)
        elif target in self.constants:
            value = self.constants[target]
        else:
            value = lookup(self.root, target.removeprefix(f"{MODULE}."))
        self.values[node] = value
        self._new.append(node)
        return node
