"""The float graph of a model and its INT8 simulation, run side by side, with what is found on the way put to use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.analysis.rounding import Roundings, rounded
from lq.analysis.samples import model_inputs
from lq.graph.analysis import GraphAnalysis
from lq.graph.interpret import run_node
from lq.graph.ops import OpKind
from lq.graph.placement import Chain
from lq.util.modes import evaluating
from lq.workflow.convert import check_calibrated
from lq.workflow.prepare import prepared_forward, unprepared

#: What the values of all samples at one node of both graphs may take, in bytes; fewer samples are run beyond that.
MEMORY = 1 << 31

#: The values of a node, of one chunk of samples each.
Chunks = list[Any]


class PairedRun:
    """Runs both graphs node by node, all samples at each node: what a layer's handler changes in INT8 is what the
    layers after it are given.

    Args:
        model: prepared and calibrated.
        batches: see :func:`lq.calibrate`.
        num_samples: an upper limit; fewer are run where their values would take more than :data:`MEMORY`.
        forward: see :func:`lq.calibrate`.
        call: what to tell the user to do before, if the model has no ranges.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        num_samples: int,
        forward: Callable[[Any], Any] | None,
        call: str,
    ) -> None:
        check_calibrated(model, call)
        self.model = model
        self.analysis: GraphAnalysis = prepared_forward(model).analyze()
        self.roundings = Roundings(model, self.analysis)
        chunks = model_inputs(model, batches, self._affordable(num_samples), forward)
        self._inputs = [list(chunk.values()) for chunk in chunks]
        self.float_values: dict[fx.Node, Chunks] = {}
        self.int8_values: dict[fx.Node, Chunks] = {}

    @property
    def chunks(self) -> int:
        """How many chunks of samples there are."""
        return len(self._inputs)

    def evaluate(self, node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
        """What a node makes of what ``read`` gives for the nodes that it reads."""
        captured = self.analysis.captured
        return run_node(node, read, self.model, lambda target: captured.read(self.model, target))

    def float_value(self, node: fx.Node, index: int) -> Any:
        """What a node made of the ``index``-th chunk, or will make where the inputs have no part in it."""
        return self._value(node, self.float_values, {}, index)

    def int8_value(self, node: fx.Node, index: int) -> Any:
        """The same in INT8: rounded."""
        return self._value(node, self.int8_values, self.roundings.whole.weights, index)

    def round_weight(self, node: fx.Node, value: Tensor) -> None:
        """Let INT8 have ``value`` for the weight that ``node`` reads."""
        self.roundings.whole.weights[node] = value
        if node in self.int8_values:
            self.int8_values[node] = [value] * self.chunks

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Chunks], weights: Mapping[fx.Node, Tensor], i: int) -> Any:
        if node in values:
            return values[node][i]
        if node in weights:
            return weights[node]
        return self.evaluate(node, lambda read: self._value(read, values, weights, i))

    @torch.no_grad()
    def run(
        self,
        before: Mapping[fx.Node, Callable[[], None]] | None = None,
        after: Mapping[fx.Node, Callable[[Chunks, Chunks], Chunks]] | None = None,
    ) -> None:
        """Run both graphs; no value is kept after its last use.

        Args:
            before: called before a node is computed in INT8, when it is in float; may change ``int8_values``.
            after: called with what a node makes in float and in INT8, not yet rounded; gives what INT8 goes on with.
        """
        nodes = list(self.analysis.graph.nodes)
        order = {node: index for index, node in enumerate(nodes)}
        dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            dying[max([node, *node.users], key=order.__getitem__)].append(node)
        self.float_values, self.int8_values = {}, {}
        inputs = iter(range(len(self._inputs[0])))
        whole = self.roundings.whole
        with unprepared(self.model), evaluating(self.model):
            for node in nodes:
                if node.op == "placeholder":
                    position = next(inputs)
                    self.float_values[node] = [chunk[position] for chunk in self._inputs]
                else:
                    self.float_values[node] = self._of_all(node, self.float_values)
                if before is not None and node in before:
                    before[node]()
                if node in whole.weights:
                    values = [whole.weights[node]] * self.chunks
                elif node.op == "placeholder":
                    values = self.float_values[node]
                else:
                    values = self._of_all(node, self.int8_values)
                if after is not None and node in after:
                    values = after[node](self.float_values[node], values)
                quantizer = whole.tensors.get(node)
                self.int8_values[node] = values if quantizer is None else [rounded(x, quantizer) for x in values]
                for dead in dying[node]:
                    self.float_values.pop(dead, None)
                    self.int8_values.pop(dead, None)

    def _of_all(self, node: fx.Node, values: Mapping[fx.Node, Chunks]) -> Chunks:
        if node.op == "get_attr":  # the same for all
            return [self.evaluate(node, lambda read: values[read][0])] * self.chunks
        return [self.evaluate(node, lambda read: values[read][index]) for index in range(self.chunks)]  # noqa: B023

    def _affordable(self, num_samples: int) -> int:
        tensors = [value for value in self.analysis.values.values() if isinstance(value, Tensor) and value.dim()]
        largest = max(value[:1].numel() for value in tensors if len(value))
        return max(1, min(num_samples, MEMORY // (2 * 4 * largest)))


def linear_end(chain: Chain) -> fx.Node:
    """The node that ends what is linear in a kernel: the batch norm, or else the layer itself."""
    return chain.batch_norm or chain.op.node


def channel_axis(chain: Chain) -> int:
    """The axis of a layer's output that its bias lies along."""
    # Of a batch norm after a linear layer, whose output is (N, C), it is the same.
    return -1 if chain.op.kind is OpKind.LINEAR else 1


def called_once(analysis: GraphAnalysis) -> list[Chain]:
    """The layers in INT8 that the forward calls once, in the order of the graph."""
    chains = analysis.placement.chains
    names = [chain.name for chain in chains]
    return [chain for chain in chains if names.count(chain.name) == 1]


def parameter_of(model: nn.Module, node: Any, chain_nodes: set[fx.Node]) -> Tensor | None:
    """The parameter or buffer that a ``get_attr`` node reads, where nothing but ``chain_nodes`` reads it."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or not node.users.keys() <= chain_nodes:
        return None
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    value = own.get(str(node.target))
    return None if value is None or not value.is_floating_point() else value.detach()
