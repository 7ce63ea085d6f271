"""Where quantizers go: chains of operators that one INT8 kernel runs, and the tensors between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from lq.graph.capture.captured import CapturedGraph
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
    def node(self) -> fx.Node:
        return self.op.node

    @property
    def reads(self) -> list[fx.Node]:
        """The tensors that it is given."""
        return [self.op.input] if self.residual is None else [self.op.input, self.residual]

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
class Operator:
    """An operator that is an INT8 kernel of its own, with the clamp after it: a sum, a product, a pool, a sigmoid.

    Args:
        node: the operator.
        clamp: the ReLU (or a relative) after it.
    """

    node: fx.Node
    clamp: fx.Node | None = None

    @property
    def kind(self) -> OpKind:
        return classify(self.node)

    @property
    def name(self) -> str:
        return site(self.node)

    @property
    def reads(self) -> list[fx.Node]:
        """Its operands: tensors, none of them a parameter of the operator."""
        operands = self.node.args[0] if self.kind is OpKind.CONCAT else self.node.args[:1]
        if self.kind in (OpKind.ADD, OpKind.MUL):
            operands = self.node.args[:2]
        return [operand for operand in operands if isinstance(operand, fx.Node)]  # type: ignore[union-attr]

    @property
    def end(self) -> fx.Node:
        return self.clamp or self.node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node,) if self.clamp is None else (self.node, self.clamp)


@dataclass
class Placement:
    """What runs in INT8, the tensors that get a quantizer, and what stays float with the reason.

    Args:
        chains: in the order of the graph.
        operators: kernels of their own, in the order of the graph.
        activations: the nodes whose output gets a quantizer; the quantizer's name is the node's ``meta["site"]``.
        normalized: what batch norms that are no part of a kernel read as integers.
        float_layers: reason why a layer stays float, by its path.
    """

    chains: list[Chain] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    activations: list[fx.Node] = field(default_factory=list)
    normalized: list[fx.Node] = field(default_factory=list)
    float_layers: dict[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> list[Chain | Operator]:
        return [*self.chains, *self.operators]

    def names_of(self, node: fx.Node) -> tuple[str, ...]:
        """The names of a tensor: its quantizer's, and that of the layer whose kernel makes it."""
        return (site(node), *(chain.name for chain in self.chains if chain.end is node))

    def kernel_of(self) -> dict[fx.Node, Chain | Operator]:
        """The kernel each node belongs to."""
        return {node: kernel for kernel in self.kernels for node in kernel.nodes}


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
    weight = str(op.weight.target) if op.weight.op == "get_attr" else ""
    if weight.endswith((".weight", "_weight")):  # an attention's `in_proj_weight`
        return weight[: -len(".weight")]
    return site(op.node)


class _Placer:
    def __init__(self, captured: CapturedGraph, values: Mapping[fx.Node, Any], scheme: Scheme) -> None:
        self.residual = scheme.residual
        self.kinds = {OpKind(name) for name in scheme.operators}
        self.integer_outputs = scheme.integer_outputs
        self.integer_batch_norms = scheme.integer_batch_norms
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
            self._attach_clamp(kernel)
        if self.kinds:
            self._place_operators()
        self._place_activations()
        return self.placement

    def _attach_clamp(self, kernel: Chain | Operator) -> None:
        follower = _next(kernel.end)
        if kernel.clamp is None and follower is not None and classify(follower) is OpKind.CLAMP:
            kernel.clamp = follower

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
        if not self._is_scale_and_shift(node):
            return None
        # A linear layer's features are its last axis, a batch norm's the second: the same only for (N, C).
        if chain.op.kind is OpKind.LINEAR and self.values[chain.op.node].dim() != 2:
            return None
        return node

    def _is_scale_and_shift(self, norm: fx.Node) -> bool:
        """Whether a batch norm multiplies and adds numbers that are known; if not, the reason is noted."""
        mean, training = norm.args[3], norm.args[5]
        if mean is None or training:
            self.placement.float_layers[site(norm)] = "it has no running statistics to fold"
            return False
        if any(isinstance(value, fx.Node) and depends_on_input(value) for value in norm.args[1:5]):
            self.placement.float_layers[site(norm)] = "its parameters are computed from the input"
            return False
        return True

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
                self.placement.operators.append(Operator(node))
            elif candidates:
                # The kernel adds to what is computed already, so the convolution that runs last does the add.
                _, chain, residual = max(candidates, key=lambda candidate: candidate[0])
                chain.add, chain.residual = node, residual

    def _place_operators(self) -> None:
        """Operators that read what an INT8 kernel makes, one after the other down the graph."""
        made = {kernel.end for kernel in self.placement.kernels}
        taken = self.placement.kernel_of()
        for node in self.graph.nodes:
            kind = classify(node)
            if node in taken or (kind not in self.kinds and kind is not OpKind.ADD):
                continue
            operator = Operator(node)
            if self._can_be_integers(operator) and any(source_of(operand) in made for operand in operator.reads):
                if kind is not OpKind.AVG_POOL:
                    self._attach_clamp(operator)
                self.placement.operators.append(operator)
                made.add(operator.end)
        self.placement.operators.sort(key=lambda operator: self.order[operator.node])

    def _can_be_integers(self, operator: Operator) -> bool:
        node = operator.node
        values = [self.values[operand] for operand in (node, *operator.reads)]
        if not all(_is_float_tensor(value) for value in values) or self.in_float(site(node)) or is_result(node):
            return False
        if "position" not in node.meta:
            return False  # it runs inside a function of torch, where no quantizer can be put
        if operator.kind in (OpKind.ADD, OpKind.MUL):
            return node.args[0] is not node.args[1] and all(depends_on_input(operand) for operand in operator.reads)
        if operator.kind is OpKind.BATCH_NORM:
            return values[0].dim() == 4 and self._is_scale_and_shift(node)
        return True

    def _place_activations(self) -> None:
        kernels = self.placement.kernels
        ends = {kernel.end for kernel in kernels}
        wanted, concats = set(), set()
        for operator in self.placement.operators:
            wanted.add(operator.end)
            if operator.kind is OpKind.CONCAT:  # its operands are written on its own grid
                concats.add(operator.node)
            else:
                wanted.update(map(source_of, operator.reads))
        for chain in self.placement.chains:
            wanted.update(map(source_of, chain.reads))
            if self.integer_outputs:
                if _next(chain.end) not in concats:
                    wanted.add(chain.end)
                continue
            if not self.kinds or chain.op.kind is not OpKind.CONV or is_result(chain.end):
                continue
            # An engine that fuses no operators into its convolutions has INT8 ones where their outputs are INT8, on
            # one grid. On that of a concatenation that alone reads them a ReLU would be a step of its own.
            if chain.clamp is not None or _next(chain.end) not in concats:
                wanted.add(chain.end)
        for node in self.graph.nodes:
            # Pooling an INT8 kernel's output: reading it as INT8 lets the kernel before write INT8.
            if classify(node) is OpKind.AVG_POOL and isinstance(node.args[0], fx.Node):
                source = source_of(node.args[0])
                if source in ends:
                    wanted.add(source)
        if self.integer_batch_norms:
            self.placement.normalized = self._before_batch_norms(ends, wanted)
            wanted.update(map(source_of, self.placement.normalized))
        self.placement.activations = sorted(wanted, key=self.order.__getitem__)

    def _before_batch_norms(self, ends: Collection[fx.Node], wanted: Collection[fx.Node]) -> list[fx.Node]:
        """What batch norms read that have nothing to be folded into and whose results are rounded: as INT8, also where
        it is concatenated, it lets the kernels before write INT8."""
        inputs: dict[fx.Node, None] = {}
        taken = self.placement.kernel_of()
        for node in self.graph.nodes:
            if classify(node) is not OpKind.BATCH_NORM or node in taken:
                continue
            norm = Operator(node)
            self._attach_clamp(norm)
            if norm.end not in wanted or not self._can_be_integers(norm):
                continue
            reads = norm.reads
            if classify(reads[0]) is OpKind.CONCAT:
                reads = Operator(reads[0]).reads
                if not all(self._can_be_a_part(read) for read in reads):
                    continue
            if any(source_of(read) in ends for read in reads) and all(map(depends_on_input, reads)):
                inputs |= dict.fromkeys(reads)
        return [*inputs]

    def _can_be_a_part(self, node: fx.Node) -> bool:
        """Whether what is concatenated can be rounded: a concatenation does not round each of its operands."""
        return _is_float_tensor(self.values[node]) and _is_returned(source_of(node))


def _is_returned(node: fx.Node) -> bool:
    """Whether ``node`` is what a call returns, an input, or an item of one; but no item of what a call returns."""
    if "position" in node.meta:
        return True
    while node.target is getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "placeholder"


def is_result(node: fx.Node) -> bool:
    """Whether nothing reads ``node`` but the network's caller: results are not rounded."""
    return all(user.op == "output" or (classify(user) in MOVES and is_result(user)) for user in node.users)


def _norm_name(norm: fx.Node) -> str:
    """What identifies a batch norm: its statistics."""
    mean = norm.args[3]
    return str(mean.target) if isinstance(mean, fx.Node) else site(norm)


def place(captured: CapturedGraph, values: Mapping[fx.Node, Any], scheme: Scheme) -> Placement:
    """Decide what runs in INT8 and which tensors get a quantizer.

    conv → batch norm → ReLU is one kernel. Where the kernel does a residual add as well (oneDNN, OpenVINO, TensorRT),
    only the operand that is *not* its own convolution is quantized; where the add is a kernel of its own (ONNX
    Runtime), both operands and the sum are, and so it is with the target's other operators. Operators that move or
    select values share the grid of their input; each distinct tensor has one quantizer at most; the classifier's
    output, which no INT8 kernel reads, stays float, unless the target's kernels give nothing but integers.

    Args:
        captured: the graph of evaluation mode.
        values: an example value for each node.
        scheme: how residual adds are computed, and what stays in float.
    """
    with torch.no_grad():
        return _Placer(captured, values, scheme).place()
