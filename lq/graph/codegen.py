"""From a graph to a Python function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function ``forward(self, *inputs)`` of a graph; ``self`` is any object with the attributes it reads."""
    code = graph.python_code("self")
    namespace = {cls.__name__: cls for cls in _named_tuples(graph.output_node().args)} | code.globals
    exec(compile(code.src, f"<{name}>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _named_tuples(value: Any) -> Iterator[type]:
    """The classes of the named tuples in a network's outputs, which are written as calls of their names."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield type(value)
    if isinstance(value, list | tuple):
        for item in value:
            yield from _named_tuples(item)
