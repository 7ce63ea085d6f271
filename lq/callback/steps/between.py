"""What a step computes between the parts of the network that it calls one by one, as a graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from keyword import iskeyword
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from lq.callback.steps.batches import count_samples, first_samples, repeat_samples
from lq.callback.steps.calls import Step
from lq.callback.steps.looking import begin_training
from lq.callback.steps.running import run_unit
from lq.callback.steps.stages import StagedUnit, staged_unit
from lq.callback.steps.twin import twin_of
from lq.errors import CaptureError
from lq.graph.capture.agreement import capture_faithfully, difference, disagreement, graph_values, seed_all
from lq.graph.capture.captured import CapturedGraph
from lq.graph.capture.exporter import TALKATIVE
from lq.int8.chain import joined
from lq.int8.module import Int8Module
from lq.interface.guards import check_guards, fixes_the_batch, inputs_of
from lq.util.modes import evaluating
from lq.util.quiet import quiet

#: What a batch's only tensor that the network reads is called in a file.
_INPUT = "input"

#: What autocast puts between a layer and what it returns.
_CONVERSIONS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype, torch.ops.aten.detach.default)


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
        calls: what it gives each part for them, as ``[args, kwargs]`` by path.
        numbers: what it depends on in the batch beside tensors, as text; they stay as they were.
    """

    captured: CapturedGraph
    module: nn.Module
    inputs: Mapping[str, Tensor]
    calls: Mapping[str, Any]
    numbers: tuple[str, ...] = ()

    @property
    def any_batch(self) -> bool:
        """Whether it holds for batches of any size."""
        return not any(map(fixes_the_batch, self._guards))

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
            self.calls,
            self._guards,
        )

    @property
    def _guards(self) -> tuple[str, ...]:
        return tuple(guard for guard in self.captured.guards if inputs_of(guard) <= self.inputs.keys())


def between_parts(staged: StagedUnit, step: Step, batches: Sequence[Any]) -> Between:
    """What a step computes from its batch to the results of the last parts that it calls; the module notices nothing.

    Args:
        staged: the parts, float or prepared.
        step: which step.
        batches: of its data, on the CPU: one that is captured, and others that it is compared with.

    Raises:
        CaptureError: where that is no graph, depends on more than the batch's tensors, or a part is called several
            times.
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
    first = first_samples(batches[0])
    forward = _StepForward(copy, step, repeat_samples(first, 2) if count_samples(first) == 1 else first)
    around.forward = forward
    if not forward.inputs:
        raise CaptureError(
            f"{step} is given no tensors, but objects of classes that hold them: use dicts, lists or tuples"
        )
    paths = {f"pl_module.{path}": path for path in staged.parts}
    # torch says at length what it cannot capture.
    with quiet("lq", "torch", *TALKATIVE), isolate_rng(), evaluating(around), torch.no_grad():
        _check_drawn(forward)
        numbers = tuple(_numbers_read(copy, step, first))
        captured = capture_faithfully(around, forward.inputs, {}, dict.fromkeys(paths, "it is in INT8"))
        graph = captured.graph
        _check_others(captured, around, [_StepForward(copy, step, first_samples(batch)) for batch in batches])
        around.forward = forward
        values = graph_values(captured, around, forward.inputs)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output", "call_module"))
    called = [node for node in graph.nodes if node.op == "call_module"]
    if sorted(str(call.target) for call in called) != sorted(paths):
        raise CaptureError(f"{step} does not call each part once")
    calls = {}
    for call in called:
        call.target = paths[str(call.target)]
        calls[call.target] = [map_arg(list(call.args), values.__getitem__), map_arg(call.kwargs, values.__getitem__)]
    _give_what_is_not_read(graph, called)
    inputs = _without_unread(graph, forward.inputs)
    if not inputs:
        raise CaptureError(
            f"{step} reads no tensor of the batch: it takes them out of an object that is no dict or list"
        )
    return Between(captured, around, inputs, calls, numbers)


def _check_others(captured: CapturedGraph, around: nn.Module, steps: Sequence[_StepForward]) -> None:
    """Compare the graph with the step on other batches.

    Raises:
        CaptureError: where they differ: something that the batch held is fixed in the graph.
    """
    names = {str(node.target) for node in captured.graph.find_nodes(op="placeholder")}
    for forward in steps:
        if forward.inputs.keys() != names:
            raise CaptureError("its batches are not alike in the tensors that they hold")
        around.forward = forward
        mismatch = disagreement(captured, around, forward.inputs, {})
        if mismatch is not None and _hold(captured.guards, forward.inputs):
            raise CaptureError(
                f"for another batch it computes something else than for the first one: a file can depend on the "
                f"tensors in a batch alone, not on numbers, texts or objects of other classes ({mismatch})"
            )


def _check_drawn(forward: _StepForward) -> None:
    """Run a step with different random numbers.

    Raises:
        CaptureError: where that makes a difference.
    """
    outputs = []
    for seed in range(2):
        seed_all(seed)
        outputs.append(forward(*(tensor.clone() for tensor in forward.inputs.values())))
    if difference(*outputs) is not None:
        raise CaptureError("it draws random numbers")


def _numbers_read(staged: StagedUnit, step: Step, batch: Any) -> Iterator[str]:
    """The numbers in a batch that make a difference to a step, each with its key."""
    leaves, spec = tree_flatten(batch)
    paths, _ = tree_flatten_with_path(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def outputs(batch: Any) -> Any:
        seed_all()
        return _StepForward(staged, step, batch)(*(tensor.clone() for tensor in tensors))

    before = outputs(batch)
    for index, (path, leaf) in enumerate(paths):
        if type(leaf) not in (int, float):
            continue
        other = tree_unflatten([*leaves[:index], 2 * leaf + 1, *leaves[index + 1 :]], spec)
        try:
            reads = difference(before, outputs(other)) is not None
        except Exception:
            reads = True
        if reads:
            yield f"{''.join(map(str, path)) or 'the batch'} = {leaf}"


def _hold(guards: Sequence[str], inputs: Mapping[str, Tensor]) -> bool:
    try:
        check_guards(guards, {name: tensor.shape for name, tensor in inputs.items()})
    except (ValueError, LookupError):
        return False
    return True


def _give_what_is_not_read(graph: fx.Graph, calls: list[fx.Node]) -> None:
    """Have the graph give the results that no other part reads: alone where they are those of one part, else by the
    paths of the parts."""
    output = graph.output_node()
    results: Any = output.args[0]
    last = {str(call.target): _unread(result, output) for call, result in zip(calls, results, strict=True)}
    last = {path: result for path, result in last.items() if result is not None}
    output.args = (next(iter(last.values())) if len(last) == 1 else last,)


def _unread(result: Any, output: fx.Node) -> Any:
    """What nothing reads of what a part returns; None where all is read. A dict keeps its keys."""
    if isinstance(result, fx.Node):
        return None if _is_read(result, output) else result
    if isinstance(result, Mapping):
        items = {key: _unread(value, output) for key, value in result.items()}
        return {key: value for key, value in items.items() if value is not None} or None
    if isinstance(result, (list, tuple)):
        values = [value for value in (_unread(value, output) for value in result) if value is not None]
        whole = len(values) == len(result)
        return result if whole else (values[0] if len(values) == 1 else values) if values else None
    return result


def _is_read(result: fx.Node, output: fx.Node) -> bool:
    """Whether anything but the graph's caller reads a result, or what it was converted from."""
    while result.target in _CONVERSIONS:
        result = result.args[0]  # type: ignore[assignment]
    same = [result]
    if result.target is operator.getitem:
        source, key = result.args
        same += [user for user in source.users if user.target is operator.getitem and user.args[1] == key]  # type: ignore[union-attr]

    def leads_out(user: fx.Node) -> bool:
        return user is output or (user.target in _CONVERSIONS and all(map(leads_out, user.users)))

    return not all(leads_out(user) for node in same for user in node.users)


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
            name = name if name.isidentifier() and not iskeyword(name) else _INPUT
            numbered = (f"{name}_{number}" for number in count(len(names)))
            names.append(next(free for free in chain([name], numbered) if free not in names))
    return names
