"""Blocks of a network: the parts between the places that everything passes through as one tensor."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, fx

from lq.graph.analysis import GraphAnalysis
from lq.graph.placement import Chain

#: Layers in a block at most. Beyond that (dense blocks, networks with connections to their very end) layers are taken
#: one by one: a residual block has two to five.
_MOST_LAYERS = 8


class Block(NamedTuple):
    """Layers that are looked at together.

    Args:
        layers: in the order of the graph.
        nodes: what has to be computed, in the order of the graph, from what was computed before the first of them. The
            last one is what leaves the block.
    """

    layers: list[Chain]
    nodes: list[fx.Node]

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


def single_layers(layers: Collection[Chain]) -> list[Block]:
    """Each layer as a block of its own, up to its activation; without what is added to it."""
    return [Block([layer], _up_to_activation(layer)) for layer in layers]


def residual_blocks(analysis: GraphAnalysis, layers: Collection[Chain], rounded: Collection[fx.Node]) -> list[Block]:
    """The parts of a graph between two tensors that everything passes through.

    In a residual network these are its residual blocks with the activation after the sum; where there are no branches,
    single layers. Layers of a part that has more than :data:`_MOST_LAYERS` of them, or no single output, are blocks of
    their own.

    Args:
        analysis: the float graph.
        layers: those of interest.
        rounded: the nodes whose tensors INT8 rounds: a block ends at one of them.
    """
    blocks: list[Block] = []
    part: list[fx.Node] = []
    of_part: list[Chain] = []
    starts = {layer.op.node: layer for layer in layers}
    computed = _computed_from_inputs(analysis)
    order = {node: index for index, node in enumerate(analysis.graph.nodes)}
    # Everything passes through a node if nothing that was computed before it is read after it.
    last_read = max(order[user] for node in analysis.graph.nodes if node.op == "placeholder" for user in node.users)
    for node in computed:
        part.append(node)
        if node in starts:
            of_part.append(starts[node])
        alone = last_read <= order[node]
        if isinstance(analysis.values[node], Tensor):
            last_read = max([last_read, *(order[user] for user in node.users)])
        if alone and node in rounded:
            if 0 < len(of_part) <= _MOST_LAYERS:
                blocks.append(Block(of_part, part))
            else:
                blocks.extend(single_layers(of_part))
            part, of_part = [], []
    blocks.extend(single_layers(of_part))
    return blocks


def _computed_from_inputs(analysis: GraphAnalysis) -> list[fx.Node]:
    """All nodes that the inputs have a part in, but the inputs and the output."""
    seen: set[fx.Node] = set()
    for node in analysis.graph.nodes:
        if node.op == "placeholder" or not seen.isdisjoint(node.all_input_nodes):
            seen.add(node)
    return [node for node in analysis.graph.nodes if node in seen and node.op not in ("placeholder", "output")]


def _up_to_activation(layer: Chain) -> list[fx.Node]:
    after = (layer.op.node, layer.batch_norm, None if layer.add else layer.clamp)
    return [node for node in after if node is not None]
