"""Running a float graph with some of its tensors and weights rounded, starting where that makes a difference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from lq.analysis.rounding import Rounding, rounded
from lq.graph.capture.captured import CapturedGraph
from lq.graph.interpret import run_node


@dataclass
class Values:
    """The values of some nodes that a run keeps.

    Args:
        made: as the operator made it.
        read: as its readers have it: rounded, where it is rounded.
    """

    made: dict[fx.Node, Any] = field(default_factory=dict)
    read: dict[fx.Node, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The part of a graph to run for one rounding, given the values of another.

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
    """Runs the evaluation graph of a float module; every value is dropped after its last use.

    Args:
        root: the module, without quantizers.
        captured: its graph.
    """

    def __init__(self, root: nn.Module, captured: CapturedGraph) -> None:
        self._root = root
        self._captured = captured
        self._nodes = list(captured.graph.nodes)
        self._dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        order = {node: index for index, node in enumerate(self._nodes)}
        for node in self._nodes:
            if node.users:
                self._dying[max(node.users, key=order.__getitem__)].append(node)

    def plan(self, rounding: Rounding, base: Rounding | None = None) -> Plan:
        """What to run for ``rounding``, after a run of ``base``; the whole graph if there is none."""
        steps: list[tuple[fx.Node, bool]] = []
        differs: set[fx.Node] = set()
        made: set[fx.Node] = set()
        read: set[fx.Node] = set()
        for node in self._nodes:
            runs = base is None or not differs.isdisjoint(node.all_input_nodes)
            if base is not None and rounding.weights.get(node) is not base.weights.get(node):
                runs = True
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
        kept = Values()
        outputs = None

        def read(node: fx.Node) -> Any:
            return env[node] if node in env else base.read[node]

        for node, runs in plan.steps:
            if not runs or node.op == "placeholder":
                value = base.made[node]
            else:
                value = self._compute(node, read, plan.rounding)
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

    def _compute(self, node: fx.Node, read: Callable[[fx.Node], Any], rounding: Rounding) -> Any:
        weight = rounding.weights.get(node)
        if weight is not None:
            return weight
        return run_node(node, read, self._root, lambda target: self._captured.read(self._root, target))
