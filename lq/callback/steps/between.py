"""What a step computes between the parts of the network that it calls one by one, as a graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from lq.callback.steps.batches import first_samples
from lq.callback.steps.calls import Step
from lq.callback.steps.looking import begin_training
from lq.callback.steps.running import run_unit
from lq.callback.steps.stages import StagedUnit, staged_unit
from lq.callback.steps.twin import twin_of
from lq.errors import CaptureError
from lq.graph.capture.capture import capture
from lq.graph.capture.captured import CapturedGraph
from lq.int8.chain import joined
from lq.int8.module import Int8Module
from lq.util.modes import evaluating
from lq.util.quiet import quiet

#: What a batch's only tensor that the network reads is called in a file.
_INPUT = "input"


class _StepForward:
    """Replaces the forward of a module around a LightningModule: runs a step up to the end of its last call of a part.

    Args:
        staged: the parts, in float.
        step: which step.
        batch: of its data; its tensors are given anew with each call.
    """

    def __init__(self, staged: StagedUnit, step: Step, batch: Any) -> None:
        self._staged, self._step = staged, step
        self._leaves, self._spec = tree_flatten(batch)
        self.inputs = dict(zip(_names(batch), (leaf for leaf in self._leaves if isinstance(leaf, Tensor)), strict=True))
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in self.inputs])

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        given = iter([*args, *kwargs.values()])
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        with _same_module_stack():
            return run_unit(self._staged, tree_unflatten(leaves, self._spec), self._step)


@contextmanager
def _same_module_stack() -> Iterator[None]:
    """A step is left from within a call of a module, which torch's tracer would take to be under way from then on."""
    mode = proxy_tensor.get_proxy_mode()
    stack = {} if mode is None else getattr(mode.tracer, "module_stack", {})
    before = dict(stack)
    try:
        yield
    finally:
        stack.clear()
        stack.update(before)


@dataclass(frozen=True)
class Between:
    """A step from its batch to the results that none of its parts reads.

    Args:
        captured: its graph, in which each part is called by its path.
        module: what the graph reads.
        inputs: the tensors of the batch that it reads, by name.
    """

    captured: CapturedGraph
    module: nn.Module
    inputs: Mapping[str, Tensor]

    def network(self, int8: Int8Module) -> Int8Module:
        """One network of the parts of ``int8``.

        Raises:
            ValueError: where they cannot be joined.
        """
        return joined(
            int8,
            self.captured.graph,
            lambda name: self.captured.read(self.module, name),
            self.inputs,
            tuple(guard for guard in self.captured.guards if any(f"({name!r}," in guard for name in self.inputs)),
        )


def between_parts(staged: StagedUnit, step: Step, batch: Any) -> Between:
    """What a step computes from its batch to the results of the last parts that it calls; the module notices nothing.

    Args:
        staged: the parts, float or prepared.
        step: which step.
        batch: of its data, on the CPU.

    Raises:
        CaptureError: where that is no graph, or a part is called several times.
    """
    twin = twin_of(staged.pl_module)
    if twin is None:
        raise CaptureError(f"{type(staged.pl_module).__name__} cannot be copied")
    copy = staged_unit(twin)
    if copy.stage == "prepared":
        copy.to_float()
    if staged.needs_hooks:
        begin_training(twin)
    around = nn.Module()
    around.pl_module = twin
    forward = _StepForward(copy, step, first_samples(batch))
    around.forward = forward
    paths = {f"pl_module.{path}": path for path in staged.parts}
    # torch says at length what it cannot capture.
    with quiet("lq", "torch"), isolate_rng(), evaluating(around), torch.no_grad():
        captured = capture(around, forward.inputs, {}, dict.fromkeys(paths, "it is in INT8"))
    graph = captured.graph
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output", "call_module"))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    if sorted(str(call.target) for call in calls) != sorted(paths):
        raise CaptureError(f"{step} does not call each part once")
    for call in calls:
        call.target = paths[str(call.target)]
    _give_what_is_not_read(graph, calls)
    return Between(captured, around, _without_unread(graph, forward.inputs))


def _give_what_is_not_read(graph: fx.Graph, calls: list[fx.Node]) -> None:
    """Have the graph give the results that no other part reads: alone where they are those of one part, else by the
    paths of the parts."""
    output = graph.output_node()
    results: Any = output.args[0]
    last = {str(c.target): result for c, result in zip(calls, results, strict=True) if not _is_read(c, output)}
    output.args = (next(iter(last.values())) if len(last) == 1 else last,)


def _is_read(value: fx.Node, output: fx.Node) -> bool:
    items = [user for user in value.users if user.target is operator.getitem]
    return any(user is not output and user not in items for user in value.users) or any(
        _is_read(item, output) for item in items
    )


def _without_unread(graph: fx.Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors that are not read, such as labels, out of the graph; those that are left."""
    read = {}
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if node.users:
            read[str(node.target)] = inputs[str(node.target)]
        else:
            graph.erase_node(node)
    return read


def _names(batch: Any) -> list[str]:
    """A name for each tensor of a batch: the key that leads to it, or ``input`` and its number."""
    paths, _ = tree_flatten_with_path(batch)
    names: list[str] = []
    for path, leaf in paths:
        if isinstance(leaf, Tensor):
            keys = [str(key.key) for key in path if hasattr(key, "key")]
            name = "_".join("".join(c if c.isalnum() else "_" for c in key) for key in keys)
            name = name if name.isidentifier() else _INPUT
            names.append(name if name not in names else f"{name}_{len(names)}")
    return names
