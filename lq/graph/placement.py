"""Where quantizers go: chains of operators that one INT8 kernel runs, and the tensors between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lq.graph.capture.capture import CapturedGraph
from lq.graph.ops import MOVES, OpKind, WeightedOp, classify, weighted_op
from lq.schemes.overrides import Scheme


@dataclass
class Chain:
    """What one INT8 kernel computes: conv or linear, then batch norm (folded), residual add and clamp, each optional.

    Args:
        op: the convolution or linear layer.
        name: the layer's path in the module, for people and for state dicts.
        batch_norm: the batch norm after it that is folded into its weight.
        add: the residual add that the kernel fuses.
        residual: the add's other operand.
        clamp: the ReLU (or a relative) after it.
    """

    op: WeightedOp
    name: str
    batch_norm: fx.Node | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    clamp: fx.Node | None = None

    @property
    def weight_key(self) -> str:
        """Name of the weight's quantizer: ``layer1.0.conv1.weight``."""
        return f"{self.name}.weight"

    @property
    def end(self) -> fx.Node:
        """The node whose value leaves the kernel."""
        return self.clamp or self.add or self.batch_norm or self.op.node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in (self.op.node, self.batch_norm, self.add, self.clamp) if node is not None)


@dataclass
class Sum:
    """A residual add that is a kernel of its own, with the clamp after it.

    Args:
        add: the add of two quantized tensors.
        clamp: the ReLU (or a relative) after it.
    """

    add: fx.Node
    clamp: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        return self.clamp or self.add


@dataclass
class Placement:
    """What runs in INT8, the tensors that get a quantizer, and what stays float with the reason.

    Args:
        chains: in the order of the graph.
        sums: residual adds that no chain fuses, in the order of the graph.
        activations: the nodes whose output gets a quantizer; the quantizer's name is the node's ``meta["site"]``.
        float_layers: reason why a layer stays float, by its path.
    """

    chains: list[Chain] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    activations: list[fx.Node] = field(default_factory=list)
    float_layers: dict[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> list[Chain | Sum]:
        return [*self.chains, *self.sums]

    def names_of(self, node: fx.Node) -> tuple[str, ...]:
        """The names of a tensor: its quantizer's, and that of the layer whose kernel makes it."""
        return (site(node), *(chain.name for chain in self.chains if chain.end is node))

    def chain_of(self) -> dict[fx.Node, Chain]:
        """The chain each node belongs to."""
        return {node: chain for chain in self.chains for node in chain.nodes}


def site(node: fx.Node) -> str:
    return str(node.meta["site"])


def source_of(node: fx.Node) -> fx.Node:
    """The tensor whose grid ``node`` lies on: only operators that move or select values are in between."""
    while classify(node) in MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _next(node: fx.Node) -> fx.Node | None:
    """The only reader of ``node``; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def depends_on_input(node: fx.Node) -> bool:
    """Whether what ``node`` computes depends on the input."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def _layer_name(op: WeightedOp) -> str:
    # A functional call takes the name of its weight's owner where it has one: conv subclasses keep their own path.
    if op.node.meta.get("layer") is not None:
        return str(op.node.meta["layer"])
    if op.weight.op == "get_attr" and str(op.weight.target).endswith(".weight"):
        return str(op.weight.target).removesuffix(".weight")
    return site(op.node)


class _Placer:
    def __init__(self, captured: CapturedGraph, values: Mapping[fx.Node, Any], scheme: Scheme) -> None:
        self.residual = scheme.residual
        self.in_float = scheme.overrides.in_float
        self.graph = captured.graph
        self.values = values
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.placement = Placement(float_layers=dict(captured.float_leaves))

    def place(self) -> Placement:
        self._find_chains()
        self._attach_batch_norms()
        self._place_residuals()
        for kernel in self.placement.kernels:
            follower = _next(kernel.end)
            if kernel.clamp is None and follower is not None and classify(follower) is OpKind.CLAMP:
                kernel.clamp = follower
        self._place_activations()
        return self.placement

    def _find_chains(self) -> None:
        for node in self.graph.nodes:
            kind = classify(node)
            if kind not in (OpKind.CONV, OpKind.LINEAR):
                continue
            op = weighted_op(node)
            if op is None:
                self.placement.float_layers[site(node)] = "its weight, stride or padding is computed from the input"
                continue
            name = _layer_name(op)
            if self.in_float(name):
                self.placement.float_layers[name] = "overrides keep it in float"
            elif not _is_float_tensor(self.values[op.input]):
                self.placement.float_layers[name] = "its input is not a floating-point tensor"
            elif op.kind is OpKind.CONV and self.values[op.input].dim() != op.spatial_dims + 2:
                self.placement.float_layers[name] = "its input has no batch axis"
            elif depends_on_input(op.weight):
                self.placement.float_layers[name] = "its weight is computed from the input"
            elif op.bias is not None and depends_on_input(op.bias):
                self.placement.float_layers[name] = "its bias is computed from the input"
            elif "position" not in node.meta:
                self.placement.float_layers[name] = "it runs inside a function of torch, where no quantizer can be put"
            else:
                self.placement.chains.append(Chain(op, name))

    def _attach_batch_norms(self) -> None:
        foldable = {chain.op.node: self._foldable_batch_norm(chain) for chain in self.placement.chains}
        norms_of: dict[str, set[str | None]] = {}
        for chain in self.placement.chains:
            norm = foldable[chain.op.node]
            norms_of.setdefault(chain.name, set()).add(_norm_name(norm) if norm is not None else None)
        for chain in self.placement.chains:
            # A layer that is called twice has one weight: a batch norm is folded in only if it is the same both times.
            if len(norms_of[chain.name]) == 1:
                chain.batch_norm = foldable[chain.op.node]

    def _foldable_batch_norm(self, chain: Chain) -> fx.Node | None:
        node = _next(chain.op.node)
        if node is None or classify(node) is not OpKind.BATCH_NORM:
            return None
        mean, training = node.args[3], node.args[5]
        if mean is None or training:
            self.placement.float_layers[site(node)] = "it has no running statistics to fold"
            return None
        if any(isinstance(value, fx.Node) and depends_on_input(value) for value in node.args[1:5]):
            self.placement.float_layers[site(node)] = "its parameters are computed from the input"
            return None
        # A linear layer's features are its last axis, a batch norm's the second: the same only for (N, C).
        if chain.op.kind is OpKind.LINEAR and self.values[chain.op.node].dim() != 2:
            return None
        return node

    def _place_residuals(self) -> None:
        ends = {chain.end: chain for chain in self.placement.chains}
        for node in self.graph.nodes:
            if classify(node) is not OpKind.ADD or node.args[0] is node.args[1]:
                continue
            left, right = node.args
            a, b = self.values[left], self.values[right]
            if not (_is_float_tensor(a) and _is_float_tensor(b) and a.shape == b.shape):
                continue
            candidates = []
            for operand, other in ((left, right), (right, left)):
                if operand in ends and _next(operand) is node and ends[operand].op.kind is OpKind.CONV:
                    candidates.append((self.order[operand], ends[operand], other))
            if self.in_float(site(node)):
                continue
            if candidates and self.residual == "operands":
                self.placement.sums.append(Sum(node))
            elif candidates:
                # The kernel adds to what is computed already, so the convolution that runs last does the add.
                _, chain, residual = max(candidates, key=lambda candidate: candidate[0])
                chain.add, chain.residual = node, residual

    def _place_activations(self) -> None:
        ends = {kernel.end for kernel in self.placement.kernels}
        wanted = set()
        for total in self.placement.sums:
            wanted.add(total.end)
            wanted.update(source_of(operand) for operand in total.add.all_input_nodes)
        for chain in self.placement.chains:
            wanted.add(source_of(chain.op.input))
            if chain.residual is not None:
                wanted.add(source_of(chain.residual))
        for node in self.graph.nodes:
            # Pooling an INT8 kernel's output: reading it as INT8 lets the kernel before write INT8.
            if classify(node) is OpKind.AVG_POOL and isinstance(node.args[0], fx.Node):
                source = source_of(node.args[0])
                if source in ends:
                    wanted.add(source)
        self.placement.activations = sorted(wanted, key=self.order.__getitem__)


def _norm_name(norm: fx.Node) -> str:
    """What identifies a batch norm: its statistics."""
    mean = norm.args[3]
    return str(mean.target) if isinstance(mean, fx.Node) else site(norm)


def place(captured: CapturedGraph, values: Mapping[fx.Node, Any], scheme: Scheme) -> Placement:
    """Decide what runs in INT8 and which tensors get a quantizer.

    conv → batch norm → ReLU is one kernel. Where the kernel does a residual add as well (oneDNN, OpenVINO, TensorRT),
    only the operand that is *not* its own convolution is quantized; where the add is a kernel of its own (ONNX
    Runtime), both operands and the sum are. Operators that move or select values share the grid of their input; each
    distinct tensor has at most one quantizer; the classifier's output, which no INT8 kernel reads, stays float.

    Args:
        captured: the graph of evaluation mode.
        values: an example value for each node.
        scheme: how residual adds are computed, and what stays in float.
    """
    with torch.no_grad():
        return _Placer(captured, values, scheme).place()
