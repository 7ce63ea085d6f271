"""From the graph that ``torch.export`` writes to ours."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lq.graph.capture import leaves
from lq.graph.capture.captured import CapturedGraph
from lq.graph.capture.exporter import Exporter
from lq.graph.capture.normalize import name_sites, normalize
from lq.graph.capture.running import Arguments, Shell
from lq.util.causes import first_line

aten = torch.ops.aten

#: Checks, which compute nothing.
_CHECKS = ("_assert", "sym_constrain_range", "_functional_assert")

#: Kinds of program inputs that are the module's own tensors.
_INPUT_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


class UnsupportedNodeError(Exception):
    """A node that our graphs cannot hold; the module whose code wrote it has to be a leaf."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


class Assembly:
    """Writes our graph from the program's."""

    def __init__(
        self,
        module: nn.Module,
        program: ExportedProgram,
        graph: fx.Graph,
        exporter: Exporter,
        arguments: Arguments,
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
                raise UnsupportedNodeError("", f"it uses an object that is not a tensor ({spec.target})")
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
            raise UnsupportedNodeError(path, f"it runs part of its forward in a separate region ({name})")
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
        if isinstance(self.module.get_submodule(call.path), Shell):
            # It is not followed, so that its readers round what it returns; and nothing can be put on it.
            made.meta["path"], _, name = call.path.rpartition(".")
            made.meta["name"] = f"{name}_result"
        elif call.result_paths == [()]:
            made.meta["position"] = call.position
        self.values[node] = [self._item(made, keys) for keys in call.result_paths]

    def _output(self, node: fx.Node) -> None:
        kinds = [spec.kind.name for spec in self.program.graph_signature.output_specs]
        outputs: Any = node.args[0]
        wanted = [value for value, kind in zip(outputs, kinds, strict=True) if kind == "USER_OUTPUT"]
        flat = [self.values[value] if isinstance(value, fx.Node) else value for value in wanted]
        try:
            result = pytree.tree_unflatten(flat, self.program.call_spec.out_spec)
            made = self.graph.output(result)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedNodeError("", f"it returns what no graph can hold: {first_line(error)}") from error
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
