"""A captured graph without writes: what an operator overwrites becomes a value of its own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lq.graph.ops import is_idle_dropout

aten = torch.ops.aten


class WriteThroughViewError(Exception):
    """A tensor is written to through a view of part of it."""


def is_write(node: fx.Node) -> bool:
    """Whether ``node`` overwrites one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def with_regions_inlined(module: Any) -> tuple[fx.Graph, torch.dtype | None]:
    """A copy of the graph of ``module`` with regions of other gradient mode or precision inlined.

    Returns:
        The graph, and the lowest precision that a region asks for: the graph ignores it.
    """
    copy = fx.Graph()
    output = copy.graph_copy(module.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    copy.output(output[0])
    precision = None
    node: Any
    for node in list(copy.nodes):
        if getattr(node.target, "__name__", "") not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        place = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        region = module.get_submodule(str(node.args[place].target))
        if place == 4 and node.args[2]:
            precision = node.args[1] or torch.get_autocast_dtype(str(node.args[0]))
        inner, lowest = with_regions_inlined(region)
        precision = lowest or precision
        given = iter(node.args[place + 1 :])
        values: dict[fx.Node, Any] = {n: next(given) for n in inner.nodes if n.op == "placeholder"}
        with copy.inserting_before(node):
            results: Any = copy.graph_copy(inner, values)
        for user in list(node.users):
            result = results[user.args[1]]
            if precision is not None and place == 4:
                with copy.inserting_before(node):
                    result = copy.call_function(aten._to_copy.default, (result,), {"dtype": user.meta["val"].dtype})
                result.meta = dict(user.meta)
            user.replace_all_uses_with(result)
            copy.erase_node(user)
        region_attribute = node.args[place]
        copy.erase_node(node)
        if not region_attribute.users:
            copy.erase_node(region_attribute)
    return copy, precision


def without_writes(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` in which each operator that overwrites its input makes a new tensor.

    Everything that reads the old one afterwards reads the new one instead; views of it are taken again.

    ``torch.export`` does this too (``run_decompositions``), exactly and in seconds; this covers what networks do, a
    hundred times as fast.

    Args:
        graph: as ``torch.export`` gives it; a node's ``meta["val"]`` is a tensor that shares its storage with those of
            the nodes it is an alias of.

    Raises:
        WriteThroughViewError: where a view is written to, and the tensor it is a view of is read afterwards.
    """
    copy = fx.Graph()
    output = copy.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    copy.output(output[0])
    if any(is_write(node) for node in copy.nodes):
        _Functional(copy).run()
    return copy


def _storage(node: fx.Node) -> int | None:
    while is_idle_dropout(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]  # torch 2.10 exports it as a tensor of its own
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def writes_to_view(write: fx.Node) -> bool:
    """Whether a write overwrites a view that differs in shape or strides from the original tensor."""
    target: Any = write.args[0]
    if not isinstance(target, fx.Node) or _storage(target) is None:
        return True  # several tensors, about which nothing is known
    source: Any = target
    while isinstance(source, fx.Node) and _storage(source) == _storage(target):
        if not _is_same_view(source, target):
            return True
        source = source.args[0] if source.op == "call_function" and source.args else None
    return False


class _Functional:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.last_use: dict[fx.Node, int] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                self.last_use[source] = self.order[node]
        self.aliases: dict[int, list[fx.Node]] = defaultdict(list)
        self.now: dict[fx.Node, fx.Node] = {}  # the node that holds the present value of each node's tensor

    def run(self) -> None:
        for node in self.nodes:
            original = tuple(node.all_input_nodes)
            if is_write(node):
                self._write(node)
            elif any(source in self.now for source in original):
                node.args = map_arg(node.args, self._current)
                node.kwargs = map_arg(node.kwargs, self._current)
            storage = _storage(node)
            if storage is not None:
                self.aliases[storage].append(node)
        for node in reversed(self.nodes):
            if is_write(node):
                self.graph.erase_node(node)

    def _current(self, node: fx.Node) -> fx.Node:
        return self.now.get(node, node)

    def _write(self, node: fx.Node) -> None:
        schema = node.target._schema  # type: ignore[union-attr]
        written = [a for a, spec in zip(node.args, schema.arguments, strict=False) if _is_written(spec)]
        target = written[0] if len(written) == 1 else None
        functional = _functional(node.target)
        if not isinstance(target, fx.Node) or target is not node.args[0] or functional is None:
            raise WriteThroughViewError(str(node))
        value: Any = target.meta["val"]
        with self.graph.inserting_before(node):
            made = self.graph.call_function(
                functional, map_arg(node.args, self._current), map_arg(node.kwargs, self._current)
            )
        made.meta = dict(node.meta)
        storage = _storage(node)
        if storage is not None:
            self.aliases[storage].append(made)
        result = node.meta["val"]
        if result.dtype != value.dtype or result.shape != value.shape:
            raise WriteThroughViewError(str(node))
        self._rebase(node, target, made)

    def _rebase(self, node: fx.Node, target: fx.Node, made: fx.Node) -> None:
        """Give all aliases of ``target`` that are read later the written value."""
        position = self.order[node]
        storage = _storage(target)
        same = {target, node}
        for alias in self.aliases.get(storage, []) if storage is not None else []:
            if _is_same_view(alias, target):
                same.add(alias)
        for one in same:
            self.now[one] = made
        for alias in self.aliases.get(storage, []) if storage is not None else []:
            if alias in same or self.last_use.get(alias, -1) <= position:
                continue
            self.now[alias] = self._taken_anew(alias, same, node)

    def _taken_anew(self, alias: fx.Node, same: set[fx.Node], before: fx.Node) -> fx.Node:
        """``alias``, which has to be a view of one of ``same``, taken of its present value."""
        chain = []
        source: Any = alias
        while source not in same:
            chain.append(source)
            source = source.args[0] if source.op == "call_function" and source.args else None
            if not isinstance(source, fx.Node) or is_write(chain[-1]):
                raise WriteThroughViewError(str(alias))
        value = self.now[source]
        for view in reversed(chain):
            with self.graph.inserting_before(before):
                again = self.graph.call_function(
                    view.target,  # type: ignore[arg-type]
                    (value, *map_arg(view.args[1:], self._current)),
                    dict(view.kwargs),
                )
            again.meta = dict(view.meta)
            value = again
        return value  # type: ignore[no-any-return]


def _is_written(spec: Any) -> bool:
    return spec.alias_info is not None and spec.alias_info.is_write


def _is_same_view(one: fx.Node, other: fx.Node) -> bool:
    """Whether two aliases are the whole of the same tensor."""
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset())


def _functional(target: Any) -> Any:
    """The operator that computes what ``target`` writes: ``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = None if packet is None else getattr(packet, target._overloadname, None)
    if overload is None or overload._schema.is_mutable:
        return None
    return overload
