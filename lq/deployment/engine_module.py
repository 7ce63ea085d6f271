"""An engine in a module's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.graph.stand_in import StandIn
from lq.int8.module import Int8Module

#: What :func:`lq.load` calls the engine that takes no file.
IN_PROCESS = "torch"


def call_by_name(int8: Int8Module, model: nn.Module, **inputs: Any) -> Any:
    """Call ``model``, the float one or what stands in for it, with inputs by name as its own callers do.

    Args:
        int8: knows the form of a call.
        model: has that form.
        **inputs: of the forward, without its settings.
    """
    args, kwargs = int8.arguments(inputs)
    return model(*args, **kwargs)


class EngineModule(StandIn):
    """An engine as a module that takes the float forward's arguments, wherever they are.

    Args:
        int8: knows the form of a call.
        run: the engine: takes the forward's inputs, by name.
    """

    def __init__(self, int8: Int8Module, run: Callable[..., Any]) -> None:
        super().__init__()
        #: Of no use but to code that asks ``next(model.parameters())`` for a device.
        self.empty = nn.Parameter(torch.empty(0), requires_grad=False)
        # In a dict, where no module looks for children: it stays on the CPU.
        self._called: dict[str, Any] = {"bind": int8.bind, "names": tuple(int8.example_inputs), "run": run}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = leaves[0].device if leaves else torch.device("cpu")
        args, kwargs = _to((args, kwargs), torch.device("cpu"))
        inputs = dict(zip(self._called["names"], self._called["bind"](args, kwargs), strict=True))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _to(self._called["run"](**inputs), device)


def _to(values: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)
