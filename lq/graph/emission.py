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
from lq.graph.placement import Chain, Operator, site, source_of
from lq.graph.qdq import DEQUANTIZE_BUFFER, DEQUANTIZE_WEIGHT, QUANTIZE_BUFFER, mark_origin
from lq.graph.stand_in import StandIn
from lq.numerics.functional import SCALE_EPS
from lq.numerics.quantizer import Quantizer
from lq.numerics.spec import QuantSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class _UnitGrid:
    """A grid for numbers that are none below 0: the zero point is the smallest integer."""

    spec: QuantSpec

    @property
    def levels(self) -> int:
        return self.spec.quant_max - self.spec.quant_min

    @property
    def bounds(self) -> tuple[int, int, torch.dtype]:
        return self.spec.quant_min, self.spec.quant_max, self.spec.dtype


@dataclass
class EmittedGraph:
    """A converted graph and the module that holds what it reads.

    Args:
        root: buffers (integer weights, scales, zero points), parameters that are not trained (biases) and float
            modules, under the float model's names.
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
        self.emitted = EmittedGraph(StandIn(), fx.Graph())
        self.graph = self.emitted.graph
        self.values: dict[fx.Node, fx.Node] = {}  # float graph -> this graph, as computed
        self.integers: dict[fx.Node, tuple[fx.Node, str]] = {}  # ... as integers, with the name of their quantizer
        self.quantized = {node: site(node) for node in analysis.placement.activations} if quantizers else {}
        # Without quantizers, operators are what they are: only the chains' batch norms are folded.
        kernels = analysis.placement.kernels if quantizers else analysis.placement.chains
        self.kernel_of = {node: kernel for kernel in kernels for node in kernel.nodes}
        self.carried = self._same_scale_nodes_in_int8()
        self.tensors = {*dict(module.named_parameters()), *dict(module.named_buffers())}

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
        """The operators that move or select values between a quantized tensor and what reads it as integers."""
        placement = self.analysis.placement
        reads = [operand for kernel in placement.kernels for operand in kernel.reads] + placement.normalized
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
        kernel = self.kernel_of.get(node)
        if kernel is not None and node is not kernel.end:
            return
        if isinstance(kernel, Operator) and kernel.kind is OpKind.HARD_SIGMOID and kernel.clamp is None:
            key = self.quantized[node]
            _, *grid = self._grid(key)
            integers = self._hard_sigmoid(kernel, f"{kernel.name}_sum", self._quantizer(key).scale.item(), tuple(grid))
            self.integers[node] = (integers, key)
            return
        if isinstance(kernel, Chain):
            value = self._emit_chain(kernel)
            self.emitted.ends[kernel.name] = (node, value)
        elif kernel is not None:
            value = self._emit_clamp(self._emit_operator(kernel), kernel.clamp)
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
                owner.add_module(scope, StandIn())
            owner = owner.get_submodule(scope)
        return owner, name

    def _buffer(self, path: str, value: Tensor) -> fx.Node:
        owner, name = self._owner(path)
        if name not in owner._buffers:
            owner.register_buffer(name, value)
        return self.graph.create_node("get_attr", path)

    def _parameter(self, path: str, value: Tensor) -> fx.Node:
        """A tensor by which code that asks ``next(model.parameters())`` for the device or dtype learns of it."""
        owner, name = self._owner(path)
        if name not in owner._parameters:
            owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return self.graph.create_node("get_attr", path)

    def _quantizer(self, key: str) -> Quantizer:
        assert self.quantizers is not None
        return self.quantizers[key]

    def _grid(self, key: str) -> tuple[Any, ...]:
        """A quantizer's scale and zero point, and the bounds and dtype of its integers."""
        quantizer = self._quantizer(key)
        # What makes the tensor may be a parameter, or a module that stays float and has a `scale` of its own.
        holder = f"{key}_quantizer" if self.tensors & {key, f"{key}.scale", f"{key}.zero_point"} else key
        scale = self._buffer(f"{holder}.scale", quantizer.scale.detach().clone())
        zero_point = self._buffer(f"{holder}.zero_point", quantizer.zero_point.detach().clone())
        return scale, zero_point, quantizer.spec.quant_min, quantizer.spec.quant_max, quantizer.spec.dtype

    def _qdq(self, op: Any, value: fx.Node, key: str) -> fx.Node:
        return self.graph.call_function(op, (value, *self._grid(key)))

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

    def _emit_operator(self, operator: Operator) -> fx.Node:
        """An operator between quantized tensors, in the form that engines have INT8 kernels for."""
        if operator.kind is OpKind.CONCAT:
            return self._emit_concat(operator)
        if operator.kind is OpKind.BATCH_NORM:
            return self._emit_batch_norm(operator)
        if operator.kind not in (OpKind.SILU, OpKind.HARD_SWISH):
            return self._copy(operator.node)
        # A product of the tensor and a gate that was made of it.
        x, holder = operator.reads[0], f"{operator.name}_gate"
        unit = self._unit_grid(operator)
        scale = self._buffer(f"{holder}.scale", torch.tensor(1.0 / unit.levels))
        grid = (self._buffer(f"{holder}.zero_point", torch.tensor(unit.spec.quant_min)), *unit.bounds)
        if operator.kind is OpKind.SILU:
            gate = self.graph.call_function(aten.sigmoid.default, (self._read(x),))
            integers = self.graph.call_function(QUANTIZE_BUFFER, (gate, scale, *grid))
        else:
            integers = self._hard_sigmoid(operator, holder, 1.0 / unit.levels, grid)
        gate = self.graph.call_function(DEQUANTIZE_BUFFER, (integers, scale, *grid))
        return self.graph.call_function(aten.mul.Tensor, (self._read(x), gate))

    def _unit_grid(self, operator: Operator) -> _UnitGrid:
        """The integers that kernels take beside those of the operand: of one type, for numbers from 0 on."""
        return _UnitGrid(self._quantizer(self.integers[operator.reads[0]][1]).spec)

    def _hard_sigmoid(self, operator: Operator, holder: str, scale: float, grid: tuple[Any, ...]) -> fx.Node:
        """``clamp(x + 3, 0, 6) / 6`` as integers: a sum, which engines have a kernel for; the grid divides by six.

        Args:
            operator: whose operand ``x`` is.
            holder: path for the buffers.
            scale: of the result.
            grid: zero point, bounds and dtype of the result.
        """
        unit = self._unit_grid(operator)
        three = self._buffer(f"{holder}.three", torch.tensor([unit.spec.quant_max], dtype=unit.spec.dtype))
        three_scale = self._buffer(f"{holder}.three_scale", torch.tensor(3.0 / unit.levels))
        three_zero = self._buffer(f"{holder}.three_zero_point", torch.tensor(unit.spec.quant_min))
        addend = self.graph.call_function(DEQUANTIZE_BUFFER, (three, three_scale, three_zero, *unit.bounds))
        total = self.graph.call_function(aten.add.Tensor, (self._read(operator.reads[0]), addend))
        clamped = self.graph.call_function(aten.hardtanh.default, (total, 0.0, 6.0))
        six_scale = self._buffer(f"{holder}.six_scale", torch.tensor(6.0 * scale))
        return self.graph.call_function(QUANTIZE_BUFFER, (clamped, six_scale, *grid))

    def _emit_concat(self, operator: Operator) -> fx.Node:
        """Of what is on the concatenation's own grid already, where its maker's kernel writes for nothing else."""
        key = self.quantized[operator.end]

        def read(operand: fx.Node) -> fx.Node:
            if operand in self.integers:
                return self._read(operand)
            return self._qdq(DEQUANTIZE_BUFFER, self._quantize(self._read(operand), key), key)

        axis = operator.node.args[1:]
        return self.graph.call_function(aten.cat.default, ([read(operand) for operand in operator.reads], *axis))

    def _emit_batch_norm(self, operator: Operator) -> fx.Node:
        """As the convolution that multiplies each channel by its factor: one weight a channel, which 8 bits hold."""
        values = self.analysis.values
        factor, shift = BatchNormStatistics.of(operator.node, values).affine()
        channels = len(factor)
        scale = (factor.abs() / 127).clamp_min(SCALE_EPS).float()
        path, x = operator.name, operator.reads[0]
        bias = round_bias(shift.float(), self._quantizer(self.integers[x][1]).scale, scale)
        weight_int = torch.round(factor / scale).clamp(-127, 127).to(torch.int8).reshape(-1, 1, 1, 1)
        integers = self._buffer(f"{path}.factor", weight_int)
        zero_point = self._buffer(f"{path}.factor_zero_point", torch.zeros(channels, dtype=torch.int64))
        args = (integers, self._buffer(f"{path}.factor_scale", scale), zero_point, 0, -127, 127, torch.int8)
        weight = self.graph.call_function(DEQUANTIZE_WEIGHT, args)
        shift_node = self._buffer(f"{path}.shift", bias)
        settings = ([1, 1], [0, 0], [1, 1], channels)
        return self.graph.call_function(CONVOLUTIONS[2], (self._read(x), weight, shift_node, *settings))

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
        bias_node = None if folded_bias is None else self._parameter(f"{chain.name}.bias", folded_bias)
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
