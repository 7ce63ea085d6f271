"""A float module seen as a graph: its operators, their example values, and where quantizers go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lq.graph.interpret import node_values
from lq.graph.placement import Placement, place
from lq.graph.tracing import TracedGraph, trace
from lq.modes import evaluating
from lq.overrides import Scheme


@dataclass(frozen=True)
class GraphAnalysis:
    """The evaluation graph of a module, an example value for each node, and the placement that follows.

    Args:
        traced: the graph of evaluation mode.
        values: a value for each node, from the example inputs.
        placement: what runs in INT8, what gets a quantizer, what stays float.
    """

    traced: TracedGraph
    values: dict[fx.Node, Any]
    placement: Placement

    @property
    def graph(self) -> fx.Graph:
        return self.traced.graph


def analyse(module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any], scheme: Scheme) -> GraphAnalysis:
    """Trace ``module`` in evaluation mode, run it once on ``inputs`` and place the quantizers.

    Args:
        module: the float module.
        inputs: example inputs by name.
        settings: the forward's other arguments.
        scheme: the target, and what differs from it.

    Raises:
        CaptureError: where its forward cannot be traced.
    """
    with evaluating(module):
        traced = trace(module, tuple(inputs), settings)
        values = node_values(traced.graph, module, inputs)
    return GraphAnalysis(traced, values, place(traced, module, values, scheme))
