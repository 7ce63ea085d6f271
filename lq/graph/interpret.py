"""Running a graph node by node to see every value in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.graph.ops import is_inplace


class _Recorder(fx.Interpreter):
    """Keeps every value as its operator made it: what an in-place operator overwrites is a copy."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if is_inplace(n, self.module) and args and isinstance(args[0], Tensor):
            args = (args[0].clone(), *args[1:])
        return args, kwargs


@torch.no_grad()
def node_values(graph: fx.Graph, root: nn.Module, inputs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """The value of each node for one set of inputs.

    Args:
        graph: the graph.
        root: the module whose attributes it reads.
        inputs: the placeholders' values by name.
    """
    interpreter = _Recorder(root, garbage_collect_values=False, graph=graph)  # type: ignore[arg-type]
    interpreter.run(*inputs.values())
    return dict(interpreter.env)
