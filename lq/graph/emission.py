"""From a prepared module's graph to the graph of its INT8 network, with quantize/dequantize pairs written out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.graph.analysis import GraphAnalysis
from lq.graph.capture.calls import FollowedForward
from lq.graph.convolution import CONVOLUTIONS
from lq.graph.folding import BatchNormStatistics, fold, round_bias
from lq.graph.ops import MOVES, OpKind, WeightedOp, clamp_bounds, classify
from lq.graph.placement import Chain, Sum, site, source_of
from lq.graph.qdq import DEQUANTIZE_BUFFER, DEQUANTIZE_WEIGHT, QUANTIZE_BUFFER, mark_origin
from lq.numerics.quantizer import Quantizer

aten = torch.ops.aten


@dataclass
class EmittedGraph:
    """A converted graph and the module that holds what it reads.

    Args:
        root: buffers (integer weights, scales, zero points, biases) and float modules, under the float model's names.
        graph: the graph; its ``get_attr`` and ``call_module`` nodes read ``root``.
        ends: for each chain, by name, the node of the float graph whose value it makes and its own node for it.
    """

    root: nn.Module
    graph: fx.Graph
    ends: dict[str, tuple[fx.Node, fx.Node]] = field(default_factory=dict)


class _Emitter:
    """Copies the float graph node by node; a chain is written at its last node."""

    def __init__(self, module: nn.Module, analysis: GraphAnalysis, quantizers: dict[str, Quantizer] | None) -> None:
        self.module = module
        self.analysis = analysis
        self.quantizers = quantizers
        self.emitted = EmittedGraph(nn.Module(), fx.Graph())
        self.graph = self.emitted.graph
        self.values: dict[fx.Node, fx.Node] = {}  # float graph -> this graph, as computed
        self.integers: dict[fx.Node, tuple[fx.Node, str]] = {}  # ... as integers, with the name of their quantizer
        self.quantized = {node: site(node) for node in analysis.placement.activations} if quantizers else {}
        self.chain_of = analysis.placement.chain_of()
        self.sums = {total.end: total for total in analysis.placement.sums} if quantizers else {}
        self.inside_sums = {total.add for total in self.sums.values() if total.add is not total.end}
        self.carried = self._same_scale_nodes_in_int8()

    def emit(self) -> EmittedGraph:
        for node in self.analysis.graph.nodes:
            self._emit(node)
            mark_origin(self.graph, site(node))
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self._drop_unread_buffers()
        self.graph.lint()
        return self.emitted

    def _drop_unread_buffers(self) -> None:
        """Nodes that only a weight is computed from are not part of the INT8 network."""
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        modules = tuple(f"{node.target}." for node in self.graph.nodes if node.op == "call_module")
        for path, _ in list(self.emitted.root.named_buffers()):
            if path not in read and not path.startswith(modules):
                owner, name = self._owner(path)
                del owner._buffers[name]

    def _same_scale_nodes_in_int8(self) -> set[fx.Node]:
        """The operators that move or select values between a quantized tensor and an INT8 kernel that reads it."""
        reads = [chain.op.input for chain in self.analysis.placement.chains]
        reads += [chain.residual for chain in self.analysis.placement.chains if chain.residual is not None]
        reads += [operand for total in self.analysis.placement.sums for operand in total.add.all_input_nodes]
        carried = set()
        for node in reads:
            if source_of(node) not in self.quantized:
                continue
            while node not in self.quantized:
                # An operator with several outputs is not a tensor itself.
                if classify(node) in MOVES and isinstance(self.analysis.values[node], Tensor):
                    carried.add(node)
                node = node.args[0]  # type: ignore[assignment]
        return carried

    def _emit(self, node: fx.Node) -> None:
        if node.op == "get_attr" and node not in self.quantized:
            return  # stored only if something reads it: a kernel's weight is read as integers, under the same name
        chain = self.chain_of.get(node)
        if (chain is not None and node is not chain.end) or node in self.inside_sums:
            return
        if chain is not None:
            value = self._emit_chain(chain)
            self.emitted.ends[chain.name] = (node, value)
        elif node in self.sums:
            value = self._emit_sum(self.sums[node])
        else:
            value = self._copy(node)
        self.values[node] = value
        if node in self.quantized:
            self.integers[node] = (self._quantize(value, self.quantized[node]), self.quantized[node])
        elif node in self.carried:
            key = self.quantized[source_of(node)]
            self.integers[node] = (self._quantize(value, key), key)

    def _read(self, node: fx.Node) -> fx.Node:
        """The value of ``node`` for one reader: where it is kept as integers, a dequantize of the reader's own."""
        if node.op == "get_attr" and node not in self.values:
            self.values[node] = self._hold_attribute(str(node.target))
        if node in self.integers:
            integers, key = self.integers[node]
            return self._qdq(DEQUANTIZE_BUFFER, integers, key)
        return self.values[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self._hold_attribute(str(node.target))
        copied = self.graph.node_copy(node, self._read)
        copied.meta = {}
        if node.op == "call_module":
            owner, name = self._owner(str(node.target))
            original = self.module.get_submodule(str(node.target))
            if not isinstance(owner._modules.get(name), type(original)):
                leaf = as_it_is(original).eval()
                for parameter in leaf.parameters():  # TorchScript modules have no requires_grad_ of their own
                    parameter.requires_grad_(False)
                owner.add_module(name, leaf)
        return copied

    def _hold_attribute(self, path: str) -> fx.Node:
        """A parameter, buffer or constant of the float module, for a reader that is not an INT8 kernel."""
        value = self.analysis.captured.read(self.module, path)
        if isinstance(value, Tensor):
            # Its name has to differ from that of the integers, if a kernel reads this parameter too.
            chains = self.analysis.placement.chains
            taken = {chain.weight_key for chain in chains} | {f"{chain.name}.bias" for chain in chains}
            # Contiguous: for channels-last weights, exporters fix sizes that decide memory formats.
            held = value.detach().clone(memory_format=torch.contiguous_format)
            return self._buffer(f"{path}_float" if path in taken else path, held)
        owner, name = self._owner(path)
        setattr(owner, name, copy.deepcopy(value))
        return self.graph.create_node("get_attr", path)

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        owner = self.emitted.root
        *scopes, name = path.split(".")
        for scope in scopes:
            if scope not in owner._modules:
                owner.add_module(scope, nn.Module())
            owner = owner.get_submodule(scope)
        return owner, name

    def _buffer(self, path: str, value: Tensor) -> fx.Node:
        owner, name = self._owner(path)
        if name not in owner._buffers:
            owner.register_buffer(name, value)
        return self.graph.create_node("get_attr", path)

    def _qdq(self, op: Any, value: fx.Node, key: str) -> fx.Node:
        assert self.quantizers is not None
        quantizer = self.quantizers[key]
        # What makes the tensor may be a parameter, or a module that stays float and has a `scale` of its own.
        tensors = {*dict(self.module.named_parameters()), *dict(self.module.named_buffers())}
        holder = f"{key}_quantizer" if tensors & {key, f"{key}.scale", f"{key}.zero_point"} else key
        scale = self._buffer(f"{holder}.scale", quantizer.scale.detach().clone())
        zero_point = self._buffer(f"{holder}.zero_point", quantizer.zero_point.detach().clone())
        spec = quantizer.spec
        args = (value, scale, zero_point, spec.quant_min, spec.quant_max, spec.dtype)
        return self.graph.call_function(op, args)

    def _quantize(self, value: fx.Node, key: str) -> fx.Node:
        return self._qdq(QUANTIZE_BUFFER, value, key)

    def _emit_chain(self, chain: Chain) -> fx.Node:
        op = chain.op
        x = self._read(op.input)
        weight, bias = self._weight_and_bias(chain)
        value = self._conv(op, x, weight, bias) if op.kind is OpKind.CONV else self._linear(x, weight, bias)
        if chain.residual is not None:
            value = self.graph.call_function(aten.add.Tensor, (value, self._read(chain.residual)))
        return self._emit_clamp(value, chain.clamp)

    def _emit_sum(self, total: Sum) -> fx.Node:
        left, right = (self._read(operand) for operand in total.add.args)  # type: ignore[arg-type]
        return self._emit_clamp(self.graph.call_function(aten.add.Tensor, (left, right)), total.clamp)

    def _emit_clamp(self, value: fx.Node, clamp: fx.Node | None) -> fx.Node:
        if clamp is None:
            return value
        bounds = clamp_bounds(clamp)
        assert bounds is not None
        low, high = bounds
        if high is None:
            return self.graph.call_function(aten.relu.default, (value,))
        return self.graph.call_function(aten.hardtanh.default, (value, low, high))

    def _weight_and_bias(self, chain: Chain) -> tuple[fx.Node, fx.Node | None]:
        values = self.analysis.values
        weight, bias = values[chain.op.weight], None if chain.op.bias is None else values[chain.op.bias]
        norm = None if chain.batch_norm is None else BatchNormStatistics.of(chain.batch_norm, values)
        quantizer = None if self.quantizers is None else self.quantizers[chain.weight_key]
        folded = fold(weight, bias, norm, quantizer)
        folded_bias = folded.bias
        if folded_bias is not None and folded.weight_scale is not None and chain.op.input in self.integers:
            assert self.quantizers is not None
            input_scale = self.quantizers[self.integers[chain.op.input][1]].scale
            folded_bias = round_bias(folded_bias, input_scale, folded.weight_scale)
        bias_node = None if folded_bias is None else self._buffer(f"{chain.name}.bias", folded_bias)
        if quantizer is None or folded.weight_int is None or folded.weight_scale is None:
            return self._buffer(f"{chain.name}.weight", folded.weight.contiguous()), bias_node
        spec = quantizer.spec
        integers = self._buffer(f"{chain.name}.weight", folded.weight_int.contiguous())
        scale = self._buffer(f"{chain.name}.weight_scale", folded.weight_scale)
        zeros = torch.zeros_like(folded.weight_scale, dtype=torch.int64)
        zero_point = self._buffer(f"{chain.name}.weight_zero_point", zeros)
        args = (integers, scale, zero_point, spec.ch_axis, spec.quant_min, spec.quant_max, spec.dtype)
        return self.graph.call_function(DEQUANTIZE_WEIGHT, args), bias_node

    def _linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        return self.graph.call_function(aten.linear.default, (x, weight, bias))

    def _conv(self, op: WeightedOp, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        padding = _padding(op, self.analysis.values[op.weight].shape)
        if any(before != after for before, after in padding):
            # Padding counts from the last axis; what it adds lies on the input's own grid (zero is always on it).
            flat = [side for pair in reversed(padding) for side in pair]
            x = self.graph.call_function(aten.pad.default, (x, flat))
            if op.input in self.integers:
                key = self.integers[op.input][1]
                x = self._qdq(DEQUANTIZE_BUFFER, self._quantize(x, key), key)
            padding = [(0, 0)] * len(padding)
        sides = [before for before, _ in padding]
        args = (x, weight, bias, list(op.stride), sides, list(op.dilation), op.groups)
        return self.graph.call_function(CONVOLUTIONS[op.spatial_dims], args)


def as_it_is(module: nn.Module) -> nn.Module:
    """An independent copy of a submodule."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if isinstance(part.__dict__.get("forward"), FollowedForward):
            own = part.__dict__["forward"].own
            del part.forward
            if own is not None:
                part.forward = own
    return copied


def _padding(op: WeightedOp, weight_shape: torch.Size) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis."""
    if op.padding == "same":
        total = [d * (k - 1) for d, k in zip(op.dilation, weight_shape[2:], strict=True)]
        return [(side // 2, side - side // 2) for side in total]
    if isinstance(op.padding, str):  # "valid"
        return [(0, 0)] * op.spatial_dims
    return [(side, side) for side in op.padding]


def emit(module: nn.Module, analysis: GraphAnalysis, quantizers: dict[str, Quantizer] | None) -> EmittedGraph:
    """Write the INT8 graph of a module; with ``quantizers=None`` the same graph in float, batch norm folded.

    Args:
        module: the prepared module, without its quantizers' child.
        analysis: its float graph.
        quantizers: by name, with their scales.
    """
    with torch.no_grad():
        return _Emitter(module, analysis, quantizers).emit()
