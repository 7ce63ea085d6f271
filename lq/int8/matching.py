"""What oneDNN's INT8 kernels compute in a quantize/dequantize graph: which of its nodes are one kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE, Grid, origin
from lq.int8.integers import border, moves, pool_of

aten = torch.ops.aten

KERNELS = {
    aten.conv1d.default: "qconv1d_pointwise",
    aten.conv2d.default: "qconv2d_pointwise",
    aten.conv3d.default: "qconv3d_pointwise",
    aten.linear.default: "qlinear_pointwise",
}

#: The unary operations that a kernel applies to its output.
_UNARY = {
    aten.conv1d.default: ("relu",),
    aten.conv2d.default: ("relu", "hardtanh"),
    aten.conv3d.default: (),
    aten.linear.default: ("relu",),
}


@dataclass
class Chain:
    """The nodes of one kernel: weighted op, add, clamp, quantize; all but the first optional."""

    # fx types an argument as a union of everything it can be; a pattern knows which it is.
    op: Any
    add: Any = None
    residual: Any = None  # the dequantize node of the other operand
    clamp: Any = None
    quantize: Any = None
    part_of: Any = None  # the quantize node of a concatenation that alone reads the result

    @property
    def grid(self) -> Grid | None:
        """Of the integers that the kernel writes; None where it writes floats."""
        node = self.quantize or self.part_of
        return None if node is None else grid_of(node)

    @property
    def end(self) -> Any:
        return self.quantize or self.clamp or self.add or self.op


def grid_of(node: fx.Node) -> Grid:
    """The grid on which the kernels, which take only uint8, compute a quantize or dequantize node."""
    return Grid.of(node).unsigned()


def only_user(node: fx.Node) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def clamp_bounds(node: Any) -> tuple[float, float] | None:
    """Lowest and highest value that a clamp lets through; None for any other node."""
    if is_call(node, aten.relu.default):
        return 0.0, float("inf")
    if is_call(node, aten.relu6.default):
        return 0.0, 6.0
    if is_call(node, aten.hardtanh.default):
        defaults: tuple[float, ...] = (-1.0, 1.0)
        given: tuple[Any, ...] = tuple(node.args[1:])
        low, high = given + defaults[len(given) :]
        return float(low), float(high)
    return None


def unary(op: Any, clamp: Any) -> tuple[str, list[float]] | None:
    """The clamp as the kernel of ``op`` fuses it; None where it does not."""
    low, high = clamp_bounds(clamp) or (0.0, 0.0)
    if (low, high) == (0.0, float("inf")):
        return ("relu", []) if "relu" in _UNARY[op.target] else None
    return ("hardtanh", [low, high]) if "hardtanh" in _UNARY[op.target] else None


@dataclass
class Normalized:
    """A batch norm with nothing to fold it into, and the clamp after it, before a quantize node that alone reads it.

    Args:
        batch_norm: the batch norm.
        clamp: the clamp after it, or None.
        concat: the concatenation of integers that it alone reads, or None.
    """

    batch_norm: Any
    clamp: Any = None
    concat: Any = None

    @property
    def integers(self) -> list[fx.Node]:
        """The dequantize nodes that it reads, one after the other along the channels; empty where it reads floats."""
        read = self.batch_norm.args[0] if self.concat is None else self.concat.args[0]
        parts = read if isinstance(read, (list, tuple)) else [read]
        return list(parts) if all(is_call(part, DEQUANTIZE) for part in parts) else []


@dataclass
class Kernels:
    """What one kernel each computes in a graph.

    Args:
        chains: weighted operators with what is fused into them, by their last node.
        moved: for a quantize node the operators before it that only move integers on its grid.
        normalized: the batch norm before a quantize node, which takes in the grid.
        concats: the concatenation before a quantize node, where kernels of its parts write integers on that grid.
        unfused: why a sum between integers is computed in float, by the name of its tensor in the float graph (see
            :func:`lq.graph.qdq.origin`), or of its node where there is none.
    """

    chains: dict[fx.Node, Chain] = field(default_factory=dict)
    moved: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    normalized: dict[fx.Node, Normalized] = field(default_factory=dict)
    concats: dict[fx.Node, Any] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)

    def inner(self) -> set[fx.Node]:
        """The nodes that are part of a kernel but not its last one."""
        nodes = [(chain.end, node) for chain in self.chains.values() for node in (chain.op, chain.add, chain.clamp)]
        inner = {node for end, node in nodes if node is not None and node is not end}
        norms = self.normalized.values()
        return inner | {node for norm in norms for node in (norm.concat, norm.batch_norm, norm.clamp) if node}

    def note(self, node: fx.Node, reason: str) -> None:
        """Say why a sum is computed in float."""
        self.unfused[origin(node) or node.name] = f"added in float: {reason}"


def _normalized(node: Any) -> Normalized | None:
    """The batch norm whose result alone a node quantizes; None where there is none."""
    if not is_call(node, QUANTIZE):
        return None
    clamp = node.args[0] if clamp_bounds(node.args[0]) is not None else None
    batch_norm: Any = node.args[0] if clamp is None else clamp.args[0]
    if not is_call(batch_norm, aten.batch_norm.default) or batch_norm.args[5]:
        return None
    weight, bias, *statistics = batch_norm.args[1:5]
    constants = [value for value in (weight, bias) if value is not None] + statistics
    reads_constants = all(value is not None and value.op == "get_attr" for value in constants)
    is_read_alone = only_user(batch_norm) is (clamp or node) and (clamp is None or only_user(clamp) is node)
    if not (reads_constants and is_read_alone):
        return None
    concat = batch_norm.args[0]
    is_of_integers = is_call(concat, aten.cat.default) and all(is_call(part, DEQUANTIZE) for part in concat.args[0])
    joins_channels = is_of_integers and len(concat.args) > 1 and concat.args[1] == 1 and only_user(concat) is batch_norm
    return Normalized(batch_norm, clamp, concat if joins_channels else None)


def find_kernels(graph: fx.Graph, root: nn.Module) -> Kernels:
    """The kernels of a graph with constant scales, which reads ``root``."""
    return _Finder(root).find(graph)


class _Finder:
    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.kernels = Kernels()

    def find(self, graph: fx.Graph) -> Kernels:
        for node in graph.nodes:
            chain = self._match(node)
            if chain is not None:
                self.kernels.chains[chain.end] = chain
        for node in graph.nodes:
            between, normalized = self._moved(node), _normalized(node)
            if between is not None:
                self.kernels.moved[node] = between
            elif normalized is not None:
                self.kernels.normalized[node] = normalized
            elif self._quantizes_parts(node):
                self._write_parts(node)
        return self.kernels

    def _match(self, node: Any) -> Chain | None:
        if not is_call(node, *KERNELS):
            return None
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        if not (is_call(x, DEQUANTIZE) and is_call(weight, DEQUANTIZE_WEIGHT)) or (
            bias is not None and bias.op != "get_attr"
        ):
            return None
        chain = Chain(node)
        user = only_user(chain.end)
        if is_call(user, aten.add.Tensor) and self._adds(node, user):
            chain.add = user
            chain.residual = user.args[1] if user.args[0] is node else user.args[0]
            user = only_user(chain.end)
        if clamp_bounds(user) is not None and (is_call(only_user(user), QUANTIZE) or unary(node, user) is not None):
            chain.clamp = user
            user = only_user(chain.end)
        if is_call(user, QUANTIZE):
            chain.quantize = user
        return chain

    def _adds(self, op: fx.Node, add: Any) -> bool:
        """Whether the kernel of ``op`` can fuse the sum, as far as the graph shows."""
        other = add.args[1] if add.args[0] is op else add.args[0]
        if not is_call(other, DEQUANTIZE):
            return False
        user = only_user(add)
        quantize = only_user(user) if clamp_bounds(user) is not None else user
        reason = None
        if op.target is not aten.conv2d.default:
            reason = "oneDNN fuses a sum only into 2-d convolutions"
        elif add.kwargs.get("alpha", 1) != 1:
            reason = f"the sum has alpha={add.kwargs['alpha']}"
        elif not is_call(quantize, QUANTIZE):
            reason = "oneDNN adds integers only if the sum is quantized too, and it is not"
        if reason is not None:
            self.kernels.note(add, reason)
        return reason is None

    def _quantizes_parts(self, node: Any) -> bool:
        """Whether a node quantizes a concatenation that nothing else reads, in which a kernel ends."""
        concat: Any = node.args[0] if is_call(node, QUANTIZE) else None
        if not is_call(concat, aten.cat.default) or concat.kwargs or only_user(concat) is not node:
            return False
        return any(
            part in self.kernels.chains and self.kernels.chains[part].quantize is None for part in concat.args[0]
        )

    def _write_parts(self, quantize: fx.Node) -> None:
        """Have the kernels of a concatenation's parts write integers."""
        concat: Any = quantize.args[0]
        self.kernels.concats[quantize] = concat
        for part in concat.args[0]:
            if part in self.kernels.chains and only_user(part) is concat and self.kernels.chains[part].quantize is None:
                self.kernels.chains[part].part_of = quantize

    def _moved(self, node: Any) -> tuple[fx.Node, ...] | None:
        """For dequantize → move or select → quantize on the same grid, the operators in between."""
        if not is_call(node, QUANTIZE) or not isinstance(node.args[0], fx.Node):
            return None
        operator: Any = node.args[0]
        pool = pool_of(operator)
        if pool is None and not moves(operator, self.root) and border(operator) is None:
            return None
        between = (operator,) if pool in (None, operator) else (operator, pool)
        last = between[-1]
        read: Any = last.args[0] if last.args else last.kwargs["input"]
        tensors = read if isinstance(read, (list, tuple)) else [read]
        if not all(is_call(tensor, DEQUANTIZE) and grid_of(tensor) == grid_of(node) for tensor in tensors):
            return None
        return between
