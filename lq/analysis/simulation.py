"""Running a float graph with some of its tensors and weights rounded, from where that makes a difference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from lq.analysis.rounding import Rounding, rounded
from lq.graph.ops import OpKind, classify, is_inplace
from lq.graph.qdq import lookup

#: Operators whose output is a tensor of its own, never a view of their input.
_FRESH = (OpKind.CONV, OpKind.LINEAR, OpKind.BATCH_NORM, OpKind.ADD)


@dataclass
class Values:
    """What a run leaves behind of some nodes.

    Args:
        made: as the operator made it.
        read: as its readers have it: rounded, where it is rounded.
    """

    made: dict[fx.Node, Any] = field(default_factory=dict)
    read: dict[fx.Node, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The part of a graph to run for one rounding, where the values for another are at hand.

    Args:
        rounding: the one to run.
        steps: the nodes whose value as it is read may differ, in order, each with whether its operator has to run
            (else only its rounding differs).
        made: the nodes whose value as made is taken from the other run.
        read: those whose value as read is.
    """

    rounding: Rounding
    steps: tuple[tuple[fx.Node, bool], ...]
    made: frozenset[fx.Node]
    read: frozenset[fx.Node]


class Simulator:
    """Runs the evaluation graph of a float module; every value that has been read for the last time is let go.

    Args:
        root: the module, without quantizers.
        graph: its graph.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._nodes = list(graph.nodes)
        self._dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        order = {node: index for index, node in enumerate(self._nodes)}
        for node in self._nodes:
            if node.users:
                self._dying[max(node.users, key=order.__getitem__)].append(node)
        self._inplace = {node for node in self._nodes if is_inplace(node, root)}
        self._fresh = {n for n in self._nodes if len(n.users) == 1 and classify(n, root) in _FRESH}

    def plan(self, rounding: Rounding, base: Rounding | None = None) -> Plan:
        """What to run for ``rounding``, after a run of ``base``; all of it without one."""
        steps: list[tuple[fx.Node, bool]] = []
        differs: set[fx.Node] = set()
        made: set[fx.Node] = set()
        read: set[fx.Node] = set()
        for node in self._nodes:
            runs = base is None or not differs.isdisjoint(node.all_input_nodes)
            if base is not None and node.op == "call_module":
                target = str(node.target)
                runs = runs or rounding.weights.get(target) is not base.weights.get(target)
            rounds = base is not None and rounding.tensors.get(node) is not base.tensors.get(node)
            if runs or rounds:
                steps.append((node, runs))
                differs.add(node)
            if runs:
                read.update(source for source in node.all_input_nodes if source not in differs)
            elif rounds:
                made.add(node)
        return Plan(rounding, tuple(steps), frozenset(made), frozenset(read))

    def run(
        self,
        plan: Plan,
        base: Values,
        keep_made: Set[fx.Node] = frozenset(),
        keep_read: Set[fx.Node] = frozenset(),
        watch: Mapping[fx.Node, Callable[[Any], None]] | None = None,
    ) -> tuple[Any, Values]:
        """``(outputs, kept values)``; the outputs are None where they are those of the other run.

        Args:
            plan: what to run.
            base: values of the other run; for a whole one, the placeholders' as made.
            keep_made: nodes whose value is to be kept as made.
            keep_read: nodes whose value is to be kept as read.
            watch: called with a node's value as made.
        """
        env: dict[fx.Node, Any] = {}
        keeps = {*keep_made, *keep_read}
        kept = Values()
        outputs = None

        def read(node: fx.Node) -> Any:
            return env[node] if node in env else base.read[node]

        for node, runs in plan.steps:
            if not runs or node.op == "placeholder":
                value = base.made[node]
            else:
                value = self._compute(node, read, plan.rounding, env.keys() - keeps)
            if watch and node in watch:
                watch[node](value)
            if node in keep_made:
                kept.made[node] = value
            quantizer = plan.rounding.tensors.get(node)
            if quantizer is not None:
                value = rounded(value, quantizer)
            if node in keep_read:
                kept.read[node] = value
            if node.op == "output":
                outputs = value
            env[node] = value
            for dead in self._dying[node]:
                env.pop(dead, None)
        return outputs, kept

    def _compute(self, node: fx.Node, read: Callable[[fx.Node], Any], rounding: Rounding, own: Set[fx.Node]) -> Any:
        if node.op == "get_attr":
            return lookup(self._root, str(node.target))
        args: Any = map_arg(node.args, read)
        kwargs: Any = map_arg(node.kwargs, read)
        if node.op == "output":
            return args[0]
        if node in self._inplace and args and isinstance(args[0], Tensor):
            source = node.args[0]
            # What nobody else will look at may be overwritten, which spares a pass through memory.
            if not (isinstance(source, fx.Node) and source in self._fresh and source in own):
                args = (args[0].clone(), *args[1:])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        module = self._root.get_submodule(str(node.target))
        weight = rounding.weights.get(str(node.target))
        if weight is None:
            return module(*args, **kwargs)
        # Called as a module all the same, so that hooks on it run as they do in the prepared model.
        module.forward = _with_weight(module, weight)
        try:
            return module(*args, **kwargs)
        finally:
            del module.forward


def _with_weight(layer: Any, weight: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(input, weight, layer.bias)
        return layer._conv_forward(input, weight, layer.bias)  # type: ignore[no-any-return]

    return forward
