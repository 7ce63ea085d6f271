"""From a module to a graph of ATen operators, by ``torch.export``; what cannot be exported becomes a leaf."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from sympy import preorder_traversal  # type: ignore[import-untyped]
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import traceback
from torch.fx.experimental import _config as _fx_config
from torch.fx.experimental import proxy_tensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from lq.errors import CaptureError, GuardError
from lq.graph.capture import leaves
from lq.graph.capture.calls import UNKNOWN, CallTracker, FollowedForward, Positions, followed
from lq.graph.capture.normalize import name_sites, normalize
from lq.graph.capture.preserve import preserved
from lq.graph.capture.registry import registered_forward
from lq.graph.capture.signature import signature_of
from lq.graph.capture.writes import (
    WriteThroughViewError,
    is_write,
    with_regions_inlined,
    without_writes,
    writes_to_view,
)
from lq.interface.guards import compile_guard, input_name
from lq.util.quiet import quiet

aten = torch.ops.aten

#: `torch.export`'s loggers that warn of sizes that turn out to be fixed, which is up to the network.
_TALKATIVE = ("torch.export", "torch._export", "torch.fx.experimental", "torch._subclasses", "torch._dynamo")


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


class Recorder(CallTracker):
    """Runs a forward as it is, and keeps what its calls return.

    Args:
        root: see :class:`CallTracker`.
        positions: likewise.
        values: whether to keep the values of functions, too, by position.
    """

    def __init__(self, root: nn.Module, positions: Positions, *, values: bool = False) -> None:
        super().__init__(root, positions, adds=True, start=(UNKNOWN, ""))
        self.calls: dict[int, leaves.Shapes] = {}
        self.values: dict[int, Tensor] | None = {} if values else None
        self.registered: set[str] = set()

    def on_module(self, followed: FollowedForward, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if registered_forward(followed.module) is not None:
            self.registered.add(type(followed.module).__name__)
        inputs = leaves.shapes((args, kwargs))  # before the forward can write to them
        result = followed.run(*args, **kwargs)
        self.calls[position] = leaves.Shapes(inputs, *leaves.flatten_shapes(result))
        return result

    def on_function(
        self, function: Callable[..., Any], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = function(*args, **kwargs)
        if self.values is not None and position != UNKNOWN and isinstance(result, Tensor):
            self.values[position] = result.detach().clone()
        return result


#: The longest expression of a free size, in terms. torch.export simplifies each size in each operator: padding that is
#: computed from the image size before each strided convolution takes it minutes, with expressions of thousands of
#: terms, where ordinary networks need up to 50.
_MAX_TERMS = 100


class _UnwieldySizeError(Exception):
    """A free size has become too long an expression to go on with."""


def _check_size(size: Any) -> None:
    if isinstance(size, torch.SymInt):
        terms = preorder_traversal(size.node._expr)
        if next(islice(terms, _MAX_TERMS, None), None) is not None:
            raise _UnwieldySizeError(f"a size is an expression of more than {_MAX_TERMS} terms")


#: ``tensor.data``, which torch.export does not follow.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Exporter(CallTracker):
    """Marks the nodes that ``torch.export`` writes with their origin, and calls leaves as one operator."""

    def __init__(self, root: nn.Module, reference: Recorder, float_leaves: dict[str, str]) -> None:
        super().__init__(root, reference.positions, adds=True, start=(UNKNOWN, ""))
        self.reference = reference
        self.float_leaves = float_leaves
        self.failed: dict[str, str] = {}
        self.calls: dict[int, leaves.LeafCall] = {}
        self.shape_env: Any = None
        #: The sizes of the inputs, by torch.export's symbols: number of the tensor, and axis.
        self.symbols: dict[str, tuple[int, int]] = {}
        self.examples: tuple[Tensor, ...] = ()
        self._asked_by_functions: set[int] = set()

    def learn_symbols(self, tensors: tuple[Tensor, ...]) -> None:
        """Note the inputs' sizes, before anything depends on them."""
        for number, tensor in enumerate(tensors):
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt):
                    self.shape_env = size.node.shape_env
                    self.symbols[str(size.node._expr)] = (number, axis)

    def _number_of_guards(self) -> int:
        return 0 if self.shape_env is None else len(self.shape_env.guards)

    def own_guards(self) -> list[Any]:
        """The conditions on sizes that the forward itself, not a torch function, tested."""
        guards = [] if self.shape_env is None else self.shape_env.guards
        return [guard.expr for index, guard in enumerate(guards) if index not in self._asked_by_functions]

    def on_module(self, followed: FollowedForward, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shapes = self.reference.calls.get(position)
        if followed.path in self.float_leaves and shapes is not None:
            return self._call_leaf(followed.path, position, shapes, args, kwargs)
        try:
            return followed.run(*args, **kwargs)
        except _UnwieldySizeError:
            raise
        except Exception as error:
            # It ran with real tensors; the innermost module that fails with fake ones becomes a leaf.
            if shapes is None or not followed.path:
                raise
            self.failed[followed.path] = _reason(error)
            return self._call_leaf(followed.path, position, shapes, args, kwargs)

    def _call_leaf(
        self, path: str, position: int, shapes: leaves.Shapes, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call, result, number = leaves.call(path, shapes, args, kwargs)
        call.position = position
        self.calls[number] = call
        return result

    def watches(self, name: str) -> bool:
        return True

    def on_function(
        self, function: Callable[..., Any], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if function == _DATA:
            return args[0].detach()  # the same tensor without its history, which torch.export can follow
        before = self._number_of_guards()
        with traceback.annotate({"lq_path": self.path, "lq_module": self.module_position}):
            result = function(*args, **kwargs)
        self._asked_by_functions.update(range(before, self._number_of_guards()))
        if isinstance(result, Tensor):
            for size in result.shape:
                _check_size(size)
            node = None if position == UNKNOWN else _node_of(result)
            if node is not None:
                node.meta.setdefault("custom", {})["lq_position"] = position
        return result


def _node_of(value: Tensor) -> fx.Node | None:
    """The node that makes a tensor in the graph that is being written."""
    mode = proxy_tensor.get_proxy_mode()
    slot = None if mode is None else proxy_tensor.get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node  # type: ignore[no-any-return]


def _reason(error: Exception) -> str:
    if "data-dependent" in str(error):
        return "its control flow depends on data"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _Call(nn.Module):
    """A call of ``module`` with its tensors as arguments and everything else fixed, for ``torch.export``."""

    def __init__(self, module: nn.Module, arguments: _Arguments, exporter: _Exporter) -> None:
        super().__init__()
        self.module = module
        self._arguments = arguments
        self._exporter = exporter

    def forward(self, *tensors: Tensor) -> Any:
        self._exporter.learn_symbols(tensors)
        args, kwargs = self._arguments.call(tensors)
        return self.module(*args, **kwargs)


class _Arguments:
    """The arguments of a call, split into tensors and the rest."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        own = module.__dict__.get("forward")
        own = getattr(own, "own", own)
        self._signature = signature_of(module, own)
        self._settings = settings
        paths, self._spec = pytree.tree_flatten_with_path(dict(inputs))
        self._values = [value for _, value in paths]
        #: For each tensor the argument's name and the keys within.
        self.paths = [leaves.keys_of(path) for path, value in paths if isinstance(value, Tensor)]
        self.names = [input_name(path) for path, value in paths if isinstance(value, Tensor)]
        self.tensors = tuple(value for value in self._values if isinstance(value, Tensor))

    def call(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = iter(tensors)
        values = [next(given) if isinstance(value, Tensor) else value for value in self._values]
        return self._signature.arguments({**pytree.tree_unflatten(values, self._spec), **self._settings})


def call_arguments(
    module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a call of ``module`` with these values of its forward's parameters."""
    arguments = _Arguments(module, inputs, settings)
    return arguments.call(arguments.tensors)


class _Shell(nn.Module):
    """Replaces a TorchScript module, whose forward cannot be changed and which torch.export does not enter."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.scripted: Callable[..., Any]
        self.__dict__["scripted"] = scripted  # not a child: its parameters stay hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            raise NotImplementedError("it is compiled by TorchScript")
        return self.scripted(*args, **kwargs)


@contextmanager
def _scripted_in_shells(module: nn.Module) -> Iterator[None]:
    held = [
        (parent, name, child)
        for parent in list(module.modules())
        if not isinstance(parent, torch.jit.ScriptModule)
        for name, child in parent._modules.items()
        if isinstance(child, torch.jit.ScriptModule)
    ]
    try:
        for parent, name, child in held:
            parent._modules[name] = _Shell(child)
        yield
    finally:
        for parent, name, child in held:
            parent._modules[name] = child


@contextmanager
def followed_whole(module: nn.Module) -> Iterator[None]:
    """Inside the context, a :class:`CallTracker` sees the forward of ``module`` and those of its submodules."""
    replaced = module.__dict__.get("forward")
    with _scripted_in_shells(module), followed(module):
        whole = FollowedForward(module, module, "")
        whole.own = getattr(replaced, "own", replaced)
        module.forward = whole
        try:
            yield
        finally:
            del module.forward
            if replaced is not None:
                module.forward = replaced


def run_followed(
    module: nn.Module, tracker: CallTracker, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> Any:
    """Call ``module``, hooks and all, under ``tracker``."""
    with followed_whole(module):
        args, kwargs = call_arguments(module, inputs, settings)
        with tracker:
            return module(*args, **kwargs)


def capture(
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    float_leaves: Mapping[str, str] | None = None,
    *,
    batch: int | None = None,
) -> CapturedGraph:
    """Capture what ``module`` computes, in the mode (training or evaluation) its submodules are in now.

    A submodule that cannot be exported (control flow that depends on data, for example) becomes a leaf that is called
    as it is; the innermost one is taken, so that as much as possible of the model stays visible.

    Args:
        module: the module.
        inputs: example inputs by the names of the forward's arguments (see :class:`CallSignature`).
        settings: its other arguments, with their values.
        float_leaves: modules to treat as leaves, by path, with the reason.
        batch: for a forward that reads its batch size as a number (``len(x)``): a batch of that size is captured, and
            multiples of that number are taken as multiples of the batch size. The caller has to check this at two
            sizes; an uncommon prime avoids coincidences.

    Raises:
        CaptureError: where the module's own forward cannot be exported.
    """
    leaves_by_path = dict(float_leaves or {})
    with preserved(module), torch.no_grad():
        reference = Recorder(module, Positions())
        run_followed(module, reference, inputs, settings)
        with followed_whole(module):
            arguments = _Arguments(module, inputs, settings)
            example = arguments.tensors if batch is None else _batches_of(batch, arguments.tensors)
            while True:
                exporter = _Exporter(module, reference, leaves_by_path)
                exporter.examples = example
                try:
                    program = _export(_Call(module, arguments, exporter), example, exporter)
                    if not exporter.failed:
                        guards = _guards(program, exporter, arguments.names)
                        program, graph, precision = _functional_graph(program)
                        captured = _Assembly(module, program, graph, exporter, arguments, batch).build()
                        break
                except _UnsupportedNodeError as error:
                    if not error.path or error.path in leaves_by_path:
                        raise _refusal(module, error) from error
                    leaves_by_path[error.path] = error.reason
                except Exception as error:
                    if not exporter.failed:
                        raise _refusal(module, error) from error
                finally:
                    leaves.forget(exporter.calls)
                # A failed attempt may have left nodes in the graph, so it is captured again without the attempt.
                leaves_by_path.update(exporter.failed)
    captured.registered = frozenset(reference.registered)
    captured.guards = guards
    captured.precision = precision
    return captured


def any_size() -> AbstractContextManager[Any]:
    """Let torch.export treat 0 and 1 like any other size, where it would exclude them from the program."""
    if not hasattr(_fx_config, "backed_size_oblivious"):
        return nullcontext()
    settings: AbstractContextManager[Any] = _fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return settings


def _batches_of(size: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor[:1].expand(size, *tensor.shape[1:]) for tensor in tensors)


def _refusal(module: nn.Module, error: Exception) -> CaptureError:
    return CaptureError(
        f"the forward of {type(module).__name__} cannot be captured as a graph: {_reason(error)}. "
        f"Move the part that depends on data into a submodule of its own (that one then stays in float), or "
        f"quantize only a part of the model by naming it"
    )


def _export(call: _Call, tensors: tuple[Tensor, ...], exporter: _Exporter) -> ExportedProgram:
    """``call`` as a program, with sizes as free as the network allows."""

    def axes(value: Tensor, free_sizes: bool) -> dict[int, Any]:
        free = range(value.dim()) if free_sizes else range(min(value.dim(), 1))
        # torch.export treats a size of one specially: an example of that size would fix it.
        return {axis: Dim.AUTO for axis in free if axis != 1 and value.shape[axis] > 1}

    attempts = (True, False)
    for free_sizes in attempts:
        exporter.calls.clear()
        exporter.failed.clear()
        exporter._stack[:] = exporter._stack[:1]
        dynamic = (tuple(axes(value, free_sizes) for value in tensors),)
        try:
            with quiet(*_TALKATIVE), any_size(), traceback.preserve_node_meta(), exporter:
                return torch.export.export(call, tensors, dynamic_shapes=dynamic, strict=False)
        except Exception:
            if free_sizes is attempts[-1]:
                raise
    raise AssertionError


def _functional_graph(program: ExportedProgram) -> tuple[ExportedProgram, fx.Graph, torch.dtype | None]:
    """The program, its graph without regions and writes, and the lowest precision that a region requests."""
    graph, precision = with_regions_inlined(program.graph_module)
    try:
        return program, without_writes(graph), precision
    except WriteThroughViewError:
        pass
    for node in program.graph.nodes:
        if is_write(node) and "custom" in node.meta and writes_to_view(node):
            # What it becomes ends in the tensor that is written to, of which the call returned a part.
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != "lq_position"}
    with quiet(*_TALKATIVE), traceback.preserve_node_meta():
        decomposed = program.run_decompositions({})
    graph, precision = with_regions_inlined(decomposed.graph_module)
    return decomposed, graph, precision


class _UnsupportedNodeError(Exception):
    """A node that our graphs cannot hold; the module whose code wrote it has to be a leaf."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


def _guards(program: ExportedProgram, exporter: _Exporter, names: Sequence[str]) -> tuple[str, ...]:
    """The conditions on sizes under which the program holds, see :mod:`lq.interface.guards`.

    Conditions of torch's own functions (can these sizes be broadcast, is this one 1, so that its stride is irrelevant)
    are tested again when they run; what the forward tests decides what it computes.
    """
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    tensors = [node for node, spec in zip(inputs, specs, strict=True) if spec.kind is InputKind.USER_INPUT]
    guards = []
    for name, node in zip(names, tensors, strict=True):
        shape = node.meta["val"].shape
        fixed = [axis for axis, size in enumerate(shape) if axis != 1 and _is_fixed(size)]
        guards += [f"size({name!r}, {axis}) == {int(shape[axis])}" for axis in fixed]
    for expression in exporter.own_guards():
        text = PythonPrinter().doprint(expression)
        asked = {symbol: at for symbol, at in exporter.symbols.items() if re.search(rf"\b{symbol}\b", text)}
        for symbol, (number, axis) in asked.items():
            text = re.sub(rf"\b{symbol}\b", f"size({names[number]!r}, {axis})", text)
        text = text.replace("torch.sym_max", "max").replace("torch.sym_min", "min")
        try:
            compile_guard(text)
            guards.append(text)
        except GuardError:  # about something other than integers: it holds for these sizes
            sizes = ((names[number], axis, exporter.examples[number].shape[axis]) for number, axis in asked.values())
            guards += [f"size({name!r}, {axis}) == {size}" for name, axis, size in sizes]
    return tuple(dict.fromkeys(guard for guard in guards if guard != "True"))


def _is_fixed(size: Any) -> bool:
    return isinstance(size, int) or bool(size.node.expr.is_number)


#: Checks, which compute nothing.
_CHECKS = ("_assert", "sym_constrain_range", "_functional_assert")

#: Kinds of program inputs that are the module's own tensors.
_INPUT_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


class _Assembly:
    """Writes our graph from the program's."""

    def __init__(
        self,
        module: nn.Module,
        program: ExportedProgram,
        graph: fx.Graph,
        exporter: _Exporter,
        arguments: _Arguments,
        batch: int | None,
    ) -> None:
        self.module = module
        self.program = program
        self.source = graph
        self.exporter = exporter
        self.arguments = arguments
        self.batch = batch
        self.batch_size: fx.Node | None = None
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}

    def build(self) -> CapturedGraph:
        self._placeholders()
        for node in self.source.nodes:
            if node.op == "call_function":
                self._function(node)
            elif node.op == "get_attr":
                self.values[node] = node  # a graph of its own, which only a region reads
            elif node.op == "output":
                self._output(node)
        self._mark_positions()
        normalize(self.graph)
        name_sites(self.graph, self.module)
        self.graph.lint()
        float_leaves = {call.path: self.exporter.float_leaves[call.path] for call in self.exporter.calls.values()}
        return CapturedGraph(self.graph, self.constants, self.exporter.positions, float_leaves)

    def _placeholders(self) -> None:
        nodes = [node for node in self.source.nodes if node.op == "placeholder"]
        specs = list(self.program.graph_signature.input_specs)
        tensors = []
        attributes = []
        for node, spec in zip(nodes, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                tensors.append(node)
            elif spec.kind in _INPUT_KINDS:
                attributes.append((node, str(spec.target)))
            else:
                raise _UnsupportedNodeError("", f"it uses an object that is not a tensor ({spec.target})")
        placeholders: dict[str, fx.Node] = {}
        for keys in self.arguments.paths:
            name = str(keys[0])
            if name not in placeholders:
                placeholders[name] = self.graph.placeholder(name)
                placeholders[name].meta = {"path": "", "name": name}
        for node, keys in zip(tensors, self.arguments.paths, strict=True):
            self.values[node] = self._item(placeholders[str(keys[0])], keys[1:])
        for node, target in attributes:
            self.values[node] = self._attribute(target, node)
        if self.batch is not None:
            self.batch_size = self._size(aten.sym_size.int, self.values[tensors[0]], 0)

    def _size(self, function: Any, *args: Any) -> fx.Node:
        made = self.graph.call_function(function, args)
        made.meta = {"path": "", "name": "size", "is_size": True}
        return made

    def _with_free_batch(self, value: Any) -> Any:
        """Numbers that stand for multiples of the batch size as expressions of it, in any nesting."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._with_free_batch(item) for item in value)
        if type(value) is not int or self.batch is None or value <= 0 or value % self.batch:
            return value
        assert self.batch_size is not None
        return (
            self.batch_size if value == self.batch else self._size(operator.mul, self.batch_size, value // self.batch)
        )

    def _attribute(self, target: str, node: fx.Node) -> fx.Node:
        path = target.removeprefix("module.")
        if not target.startswith("module.") or not _has(self.module, path):
            path = f"lq_constant_{len(self.constants)}"
            self.constants[path] = self.program.constants[target].detach()
        made = self.graph.create_node("get_attr", path)
        made.meta = {"path": "", "name": path}
        return made

    def _item(self, value: fx.Node, keys: Iterable[Any]) -> fx.Node:
        for key in keys:
            item = self.graph.call_function(operator.getitem, (value, key))
            item.meta = {**value.meta, "name": "item", "position": None}
            del item.meta["position"]
            value = item
        return value

    def _function(self, node: fx.Node) -> None:
        custom = node.meta.get("custom") or {}
        path = str(custom.get("lq_path", ""))
        name = getattr(node.target, "__name__", str(node.target))
        if name.startswith(_CHECKS):
            return
        if node.target is leaves.operator_of_leaves():
            self._leaf(node)
            return
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(self.values.get(source), list):
            self.values[node] = self.values[source][node.args[1]]
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator) or any(
            n.op == "get_attr" for n in node.all_input_nodes
        ):
            raise _UnsupportedNodeError(path, f"it runs part of its forward in a separate region ({name})")
        if self.batch is None:
            made = self.graph.node_copy(node, lambda n: self.values[n])
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.values[n])
            free = {name: self._with_free_batch(value) for name, value in kwargs.items()}
            made = self.graph.call_function(node.target, self._with_free_batch(tuple(args)), free)  # type: ignore[arg-type]
        made.meta = {
            "path": path,
            "module": custom.get("lq_module"),
            "name": _operator_name(node),
            "is_size": not isinstance(node.meta.get("val"), (Tensor, tuple, list)),
            "exported": node,
        }
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            made.meta["shape"] = tuple(size if isinstance(size, int) else None for size in value.shape)
            made.meta["dtype"] = value.dtype
        self.values[node] = made

    def _leaf(self, node: fx.Node) -> None:
        call = self.exporter.calls[int(node.args[1])]  # type: ignore[arg-type]
        tensors: Any = map_arg(node.args[0], lambda n: self.values[n])
        args, kwargs = call.arguments(tensors)
        made = self.graph.call_module(call.path, args, kwargs)
        made.meta = {"path": call.path, "module": call.position, "name": call.path}
        self.values[node] = [self._item(made, keys) for keys in call.result_paths]
        if call.result_paths == [()]:
            made.meta["position"] = call.position

    def _output(self, node: fx.Node) -> None:
        kinds = [spec.kind.name for spec in self.program.graph_signature.output_specs]
        outputs: Any = node.args[0]
        wanted = [value for value, kind in zip(outputs, kinds, strict=True) if kind == "USER_OUTPUT"]
        flat = [self.values[value] if isinstance(value, fx.Node) else value for value in wanted]
        try:
            result = pytree.tree_unflatten(flat, self.program.call_spec.out_spec)
            made = self.graph.output(result)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _UnsupportedNodeError("", f"it returns what no graph can hold: {_first_line(error)}") from error
        made.meta = {"path": "", "name": "output"}

    def _mark_positions(self) -> None:
        """Note the position of each call on the node that makes its result."""
        last: dict[int, fx.Node] = {}
        for node in self.graph.nodes:
            exported = node.meta.pop("exported", None)
            position = None if exported is None else (exported.meta.get("custom") or {}).get("lq_position")
            if position is not None:
                last[position] = node
        for position, node in last.items():
            node.meta["position"] = position


def _has(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return isinstance(getattr(module.get_submodule(owner), name), Tensor)
    except AttributeError:
        return False


def _operator_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.partition("::")[2]).strip("_")
    return str(getattr(node.target, "__name__", "op")).strip("_")
