"""A module's forward as a graph of ATen operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.graph.capture.calls import Positions


@dataclass
class CapturedGraph:
    """A module's forward, hooks included, as a graph of ATen operators without writes.

    In a node's ``meta``, ``"site"`` names the tensor it makes, after the place in the module; ``"path"`` is the path of
    the module whose code makes it; ``"layer"`` that of the ``torch.nn`` layer or leaf that it is (part of), or None;
    ``"position"`` is set where a call returns the tensor (see :mod:`lq.graph.capture.calls`).

    Args:
        graph: reads the module's attributes and ``constants``.
        constants: tensors that the forward makes from numbers, by the name that the graph reads them under.
        positions: of the calls that make the nodes.
        float_leaves: paths of the modules that are called as they are, with the reason.
        registered: classes of the layers whose registered function was captured in place of their forward.
        guards: the conditions on the sizes of the inputs, see :mod:`lq.interface.guards`.
        precision: the lowest that a region of the forward has under autocast, or None; the graph ignores it.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    positions: Positions
    float_leaves: dict[str, str] = field(default_factory=dict)
    registered: frozenset[str] = frozenset()
    guards: tuple[str, ...] = ()
    precision: torch.dtype | None = None

    def read(self, module: nn.Module, target: str) -> Any:
        """The attribute of ``module``, or the constant, that a ``get_attr`` node reads."""
        if target in self.constants:
            return self.constants[target]
        path, _, name = target.rpartition(".")
        return getattr(module.get_submodule(path), name)
