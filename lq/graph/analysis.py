"""A float module seen as a graph: its operators, their example values, and where quantizers go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lq.graph.capture.captured import CapturedGraph
from lq.graph.capture.preserve import preserved
from lq.graph.interpret import node_values, output_of
from lq.graph.placement import Placement, place
from lq.schemes.overrides import Scheme


@dataclass(frozen=True)
class GraphAnalysis:
    """The evaluation graph of a module, an example value for each node, and the placement that follows.

    Args:
        captured: the graph of evaluation mode.
        values: a value for each node, from the example inputs.
        placement: what runs in INT8, what gets a quantizer, what stays float.
    """

    captured: CapturedGraph
    values: dict[fx.Node, Any]
    placement: Placement

    @property
    def graph(self) -> fx.Graph:
        return self.captured.graph

    @property
    def outputs(self) -> Any:
        """What the graph returns for the example inputs."""
        return self.values[output_of(self.graph)]


def analyze_graph(
    captured: CapturedGraph, module: nn.Module, inputs: Mapping[str, Any], scheme: Scheme
) -> GraphAnalysis:
    """Run a captured graph once on ``inputs`` and place the quantizers.

    Args:
        captured: the graph of ``module`` in evaluation mode.
        module: the float module, which is in that mode.
        inputs: example inputs by name.
        scheme: the target, and what differs from it.
    """
    with preserved(module):
        values = node_values(captured.graph, module, inputs, lambda target: captured.read(module, target))
    return GraphAnalysis(captured, values, place(captured, values, scheme))
