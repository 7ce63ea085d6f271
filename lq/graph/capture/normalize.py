"""One form for each computation in a captured graph, and a name for each tensor in it."""

from __future__ import annotations

import math
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from lq.graph.ops import argument, is_idle_dropout

aten = torch.ops.aten

_COPIES_OF_A_NAME = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)

#: Conversions that change nothing where dtype and device are the input's.
_CONVERSIONS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
)

_END = 9223372036854775807


def normalize(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place: no identities, batch norm as one operator, views that take any memory format."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            if "position" in node.meta and "position" not in node.args[0].meta and node.args[0].op != "placeholder":
                node.args[0].meta["position"] = node.meta["position"]
            graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _join_batch_norm(graph, node)
        elif node.target in (math.ceil, math.floor) and _is_quotient(node.args[0]):
            _divide_integers(graph, node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # the memory format may be channels-last
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if is_idle_dropout(node):
        return True
    if node.target in _COPIES_OF_A_NAME:
        return True
    if node.target is aten.slice.Tensor:
        return argument(node, 2, "start") in (None, 0) and argument(node, 3, "end") == _END and len(node.args) < 5
    if node.target in _CONVERSIONS:
        same = "dtype" in source.meta and source.meta.get("dtype") == node.meta.get("dtype")
        return same and node.target is not aten.to.device and "memory_format" not in node.kwargs
    return False


def _is_quotient(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is operator.truediv


def _divide_integers(graph: fx.Graph, node: fx.Node) -> None:
    """``ceil(a / b)`` and ``floor(a / b)`` of sizes, which exporters support only as integer divisions."""
    quotient: Any = node.args[0]
    a, b = quotient.args
    steps: list[tuple[Any, Any]] = [(operator.floordiv, b)]
    if node.target is math.ceil:
        steps = [(operator.mul, -1), *steps, (operator.mul, -1)]
    value: Any = a
    for function, other in steps:
        with graph.inserting_before(node):
            value = graph.call_function(function, (value, other))
        value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _join_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """``batch_norm`` of evaluation mode, from the operator that has three outputs."""
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.inserting_before(node):
        norm = graph.call_function(aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False))
    norm.meta = {**node.meta, "name": "batch_norm"}
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            for key in ("position", "shape", "dtype"):
                if key in user.meta:
                    norm.meta[key] = user.meta[key]
            user.replace_all_uses_with(norm)
            graph.erase_node(user)


def name_sites(graph: fx.Graph, module: nn.Module) -> None:
    """Give each node a name that depends on where in the module it is made, not on its place in the whole graph.

    What a layer of ``torch.nn`` or a leaf returns is called like the layer.
    """
    ends: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        node.meta["layer"] = _layer(node, module)
        if node.meta["layer"] is not None and not node.meta.get("is_size"):
            ends[node.meta.get("module")] = node
    bases = {node: _base(node, ends) for node in graph.nodes}
    taken = set(bases.values())
    seen: Counter[str] = Counter()
    for node, base in bases.items():
        name = base
        if seen[base]:
            name = f"{base}_{seen[base]}"
            while name in taken:  # the module has a `relu_1`, and calls its `relu` twice
                seen[base] += 1
                name = f"{base}_{seen[base]}"
        seen[base] += 1
        taken.add(name)
        node.meta["site"] = name


#: Layers of torch that are made of several.
_OF_SEVERAL = (nn.Sequential, nn.MultiheadAttention)


def _layer(node: fx.Node, module: nn.Module) -> str | None:
    path = str(node.meta["path"])
    if node.op == "call_module":
        return path if path == node.target else None
    if node.op != "call_function" or not path:
        return None
    owner = module.get_submodule(path)
    is_torchs = type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, _OF_SEVERAL)
    return path if is_torchs else None


def _base(node: fx.Node, ends: dict[Any, fx.Node]) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.meta["name"])
    layer = node.meta["layer"]
    if layer is not None and ends.get(node.meta.get("module")) is node:
        return str(layer)
    name = str(node.meta["name"])
    if hasattr(nn.Module, name):  # `x.float()`: a module of quantizers cannot have a child called like its method
        name = f"{name}_op"
    path = node.meta["path"]
    return f"{path}.{name}" if path else name
