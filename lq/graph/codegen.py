"""From a graph to a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function ``forward(self, *inputs)`` of a graph; ``self`` is any object with the attributes it reads."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{name}>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward
