"""Lowering of a quantize/dequantize graph to torch's oneDNN INT8 kernels, in process, without a compiler.

``torchao.quantization.pt2e.lowering.lower_pt2e_quantized_to_x86`` does the same through Inductor's private pattern
passes and in seconds; this graph is our own, so its patterns are known exactly.

A lowered graph is a plan for one set of input sizes: oneDNN lays weights out for the sizes that a kernel meets, and
re-orders them at every call where they were laid out for others. So it is made by running it: each kernel is written
once its operands exist, with their sizes and strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from lq.graph.codegen import compile_graph
from lq.graph.convolution import conv_settings
from lq.graph.qdq import DEQUANTIZE, QUANTIZE, Grid, lookup, mark_origin, origin
from lq.int8.integers import (
    POOLS,
    asks_for_sizes,
    border,
    dequantize_activation,
    has_dtype,
    pad,
    pool_call,
    quantize_activation,
    quantize_features,
    quantize_normalized,
    subsample,
)
from lq.int8.liveness import Liveness
from lq.int8.matching import KERNELS, Chain, clamp_bounds, find_kernels, grid_of, is_call, unary
from lq.int8.recording import Recording, mapped
from lq.util.cpu import has_vnni

aten = torch.ops.aten
onednn = torch.ops.onednn

#: Called with the integers of each quantize node of the source graph when they are first computed.
Watch = Callable[[fx.Node, Tensor], Tensor]

#: The words of oneDNN's ``dnnl_memory_desc`` that align the next field. What is in them says nothing; where another
#: version has another struct, layouts that are alike are not shared, or one is re-ordered at each call.
_UNINITIALIZED = frozenset({1, 27, 79})

#: Packed weights that are in use, by layer, settings and layout.
Packed = WeakValueDictionary[tuple[Any, ...], Tensor]


def weight_for_this_cpu(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as this CPU's kernels can use it without overflow: as it is, or rounded to 7 bits."""
    if has_vnni() or weight.abs().max() <= 64:
        return weight, scale
    return torch.round(weight.float() / 2).to(torch.int8), scale * 2


@dataclass
class LoweredGraph:
    """A graph whose INT8 operators are kernels, and the packed weights it reads.

    Args:
        graph: reads ``self.module`` (the module it was lowered from) and the constants.
        constants: packed weights, scales and biases by attribute name.
        float_ops: names of the conv and linear operators without a kernel, which compute in float.
        unfused: why a sum or a clamp between integers is computed in float nevertheless, by the name of its tensor in
            the float graph (see :func:`lq.graph.qdq.origin`), or of its node where there is none.
        outputs: for the inputs it was lowered with.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    float_ops: list[str] = field(default_factory=list)
    unfused: dict[str, str] = field(default_factory=dict)
    outputs: Any = field(default=None, repr=False)

    def compile(self, module: nn.Module) -> Callable[..., Any]:
        forward = compile_graph(self.graph, "lowered INT8 graph")
        state = SimpleNamespace(module=module, **self.constants)
        return lambda *inputs: forward(state, *inputs)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _integer(value: float, grid: Grid) -> int:
    """The integer for ``value``, as the quantize operator rounds it."""
    if value in (float("inf"), -float("inf")):
        return grid.quant_max if value > 0 else grid.quant_min
    return int(quantize_activation(torch.tensor(value), grid.scale, grid.zero_point, grid.quant_min, grid.quant_max))


def _clamped(clamp: Any, grid: Grid) -> tuple[int, int]:
    """The lowest and highest integer of a grid after a clamp, or without one."""
    bounds = clamp_bounds(clamp)
    if bounds is None:
        return grid.quant_min, grid.quant_max
    # Rounding is monotonic, so it commutes with clamping.
    return _integer(bounds[0], grid), _integer(bounds[1], grid)


class _Lowering:
    """Writes the lowered graph and runs each node of it as it is written; ``written`` has it for each source node."""

    def __init__(
        self, graph: fx.Graph, root: nn.Module, inputs: Sequence[Any], watch: Watch | None, packed: Packed | None
    ) -> None:
        self.source = graph
        self.root = root
        self.watch = watch
        self.packed: Packed = WeakValueDictionary() if packed is None else packed
        self.kernels = find_kernels(graph, root)
        self.liveness = Liveness(graph, self.kernels)
        self.recording = Recording(root, inputs)
        self.written: dict[fx.Node, fx.Node] = {}
        self.float_ops: list[str] = []

    def run(self) -> LoweredGraph:
        outputs: Any = None
        for node in self.source.nodes:
            if not self.liveness.is_written_later(node):
                written = self._emit_node(node)
                self.written[node] = written
                if node.op == "output":
                    outputs = mapped(written.args[0], self.recording.values.__getitem__)
                mark_origin(self.recording.graph, origin(node))
                self._forget(node)
        graph = self.recording.graph
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        graph.lint()
        return LoweredGraph(graph, self.recording.constants, self.float_ops, self.kernels.unfused, outputs)

    def _forget(self, node: fx.Node) -> None:
        """Drop what nothing reads any more: a large batch has many activations."""
        self.recording.keep(self.written[node])
        for read in self.liveness.last_read(node):
            if read in self.written:
                self.recording.values.pop(self.written[read], None)

    def _emit_node(self, node: fx.Node) -> fx.Node:
        if node.op == "output":
            return self._copy(node, self._read)
        if node in self.kernels.chains:
            written = self._emit_chain(self.kernels.chains[node])
            is_quantized = self.kernels.chains[node].quantize is not None
        elif is_call(node, QUANTIZE):
            written = self._emit_quantize(node)
            is_quantized = True
        else:
            self._note_float(node)
            written = self._copy(node, self._reader(node))
            is_quantized = False
        if is_quantized and self.watch is not None:
            self.recording.values[written] = self.watch(node, self.recording.values[written])
        return written

    def _copy(self, node: fx.Node, read: Callable[[fx.Node], fx.Node]) -> fx.Node:
        target: Any = None
        # The kernels use channels-last memory, so a view of a contiguous tensor may have to be a copy.
        if node.op == "call_method" and node.target == "view" and not has_dtype(node):
            target = "reshape"
        elif is_call(node, aten.view.default):
            target = aten.reshape.default
        return self.recording.copy(node, read, target)

    def _read(self, node: Any) -> fx.Node:
        if is_call(node, DEQUANTIZE):
            grid = grid_of(node)
            return self.recording.call(dequantize_activation, (self.written[node.args[0]], grid.scale, grid.zero_point))
        return self.written[node]

    def _read_integers(self, node: Any) -> fx.Node:
        return self.written[node.args[0]] if is_call(node, DEQUANTIZE) else self.written[node]

    def _reader(self, node: fx.Node) -> Callable[[fx.Node], fx.Node]:
        """The function that writes what ``node`` reads."""
        if asks_for_sizes(node):
            return self._read_integers
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        is_foreign = module is not None and not type(module).__module__.startswith("torch.nn.")
        return self._read_contiguous if is_foreign else self._read

    def _read_contiguous(self, node: Any) -> fx.Node:
        # Code that is called as it is may take views that need the float model's contiguous memory.
        return self.recording.call(_contiguous, (self._read(node),))

    def _emit_quantize(self, node: Any) -> fx.Node:
        if node in self.kernels.moved:
            return self._emit_moved(node)
        if node in self.kernels.concats:
            return self._emit_concat(node)
        if node in self.kernels.normalized:
            return self._emit_normalized(node)
        return self._quantize(self._read(node.args[0]), node)

    def _emit_concat(self, node: Any) -> fx.Node:
        """Of integers: to round each part is to round the whole."""
        parts, *axis = self.kernels.concats[node].args
        integers = [
            self.written[part]
            if part in self.kernels.chains and self.kernels.chains[part].part_of is node
            # A float, or what several read on grids of their own.
            else self._quantize(self._read(part), node)
            for part in parts
        ]
        return self.recording.call(aten.cat.default, (integers, *axis))

    def _emit_normalized(self, node: Any) -> fx.Node:
        """A batch norm that gives steps of the grid."""
        norm, grid = self.kernels.normalized[node], grid_of(node)
        weight, bias, mean, variance = (
            None if value is None else lookup(self.root, value.target).detach() for value in norm.batch_norm.args[1:5]
        )
        assert mean is not None
        epsilon, low_high = norm.batch_norm.args[7], _clamped(norm.clamp, grid)
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        if norm.integers and len(self._shape(norm.integers[0])) == 4:
            assert variance is not None
            factor = weight.double() / (variance.double() + epsilon).sqrt()
            return self._scale_channels(norm.integers, factor, bias - mean * factor, grid, *low_high)
        name = f"norm{len(self.recording.constants)}"
        x = self._read(norm.batch_norm.args[0]) if norm.concat is None else self._copy(norm.concat, self._read)
        return self.recording.call(
            quantize_normalized,
            (
                x,
                self.recording.constant(f"{name}_weight", weight / grid.scale),
                self.recording.constant(f"{name}_bias", bias / grid.scale),
                self.recording.constant(f"{name}_mean", mean),
                self.recording.constant(f"{name}_variance", variance),
                epsilon,
                grid.zero_point,
                *low_high,
            ),
        )

    def _scale_channels(
        self, integers: list[fx.Node], factor: Tensor, shift: Tensor, grid: Grid, low: int, high: int
    ) -> fx.Node:
        """``factor * x + shift`` of each channel, from integers to integers: a convolution with one weight a channel.

        What is concatenated may lie on several grids: the grid of a channel is a factor and a shift as well.
        """
        sizes, grids = [self._shape(part)[1] for part in integers], [grid_of(part) for part in integers]
        factor = factor * torch.cat([torch.full((n,), g.scale).double() for n, g in zip(sizes, grids, strict=True)])
        zero = torch.cat([torch.full((n,), g.zero_point).double() for n, g in zip(sizes, grids, strict=True)])
        bias, scale, channels = (shift - factor * zero).float(), factor.abs().float(), len(factor)
        values = [self._read_integers(part) for part in integers]
        x = values[0] if len(values) == 1 else self.recording.call(aten.cat.default, (values, 1))
        name, geometry = f"norm{len(self.recording.constants)}", ([1, 1], [0, 0], [1, 1], channels)
        sign = torch.where(factor < 0, -1, 1).to(torch.int8).reshape(-1, 1, 1, 1)
        packed = self._pack(f"{name}_sign", sign, scale, (1.0, 0, *geometry), x)
        inputs = (x, 1.0, 0, *self._weight(name, packed, scale))
        output = (grid.scale, grid.zero_point, torch.uint8)
        bias_node = self.recording.constant(f"{name}_bias", bias)
        args: tuple[Any, ...] = (*inputs, bias_node, *geometry, *output, "none", [], "")
        return self._limit(self.recording.call(onednn.qconv2d_pointwise.default, args), low, high)

    def _quantize(self, x: fx.Node, node: Any) -> fx.Node:
        grid = grid_of(node)
        args = (x, grid.scale, grid.zero_point, grid.quant_min, grid.quant_max)
        readers = [reader for dequantize in node.users for reader in dequantize.users]
        features = all(is_call(reader, aten.linear.default) for reader in readers)
        return self.recording.call(quantize_features if features else quantize_activation, args)

    def _emit_moved(self, node: Any) -> fx.Node:
        """The operator itself, on the integers."""
        operator = self.kernels.moved[node][-1]
        if operator.target in POOLS:
            function, args, kwargs = pool_call(operator)
            args, kwargs = mapped(args, self._read_integers), mapped(kwargs, self._read_integers)
            return self.recording.call(function, args, kwargs)
        args = mapped(operator.args, self._read_integers)
        sides = border(operator)
        if sides is not None:
            return self.recording.call(aten.constant_pad_nd.default, (args[0], list(sides), grid_of(node).zero_point))
        return self._copy(operator, self._read_integers)

    def _note_float(self, node: Any) -> None:
        if is_call(node, *KERNELS):
            self.float_ops.append(node.name)
        if is_call(node, aten.add.Tensor) and all(is_call(value, DEQUANTIZE) for value in node.args):
            self.kernels.note(node, "oneDNN has no INT8 kernel for a separate sum")

    def _emit_chain(self, chain: Chain) -> fx.Node:
        if chain.residual is not None and not self._fits(chain):
            return self._emit_apart(chain)
        return self._emit_kernel(chain)

    def _fits(self, chain: Chain) -> bool:
        """Whether the sum has the convolution's own shape, into which the kernel writes it."""
        ours, other = self._output_shape(chain.op), self._shape(chain.residual)
        padded = (1,) * (len(ours) - len(other)) + other
        fits = len(padded) == len(ours) and all(b in (1, a) for a, b in zip(ours, padded, strict=True))
        if not fits:
            self.kernels.note(chain.add, f"the convolution gives the shape {ours}, the other operand has {other}")
        return fits

    def _shape(self, dequantize: Any) -> tuple[int, ...]:
        return self.recording.shape(self.written[dequantize.args[0]])

    def _output_shape(self, op: Any) -> tuple[int, ...]:
        batch, _, *sizes = self._shape(op.args[0])
        weight = lookup(self.root, op.args[1].args[0].target)
        settings = zip(sizes, weight.shape[2:], *conv_settings(op)[:3], strict=True)
        return batch, len(weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in settings)

    def _emit_apart(self, chain: Chain) -> fx.Node:
        """The convolution with its kernel, everything after it in float."""
        node = self._emit_kernel(Chain(chain.op))
        operands = (node if value is chain.op else self._read(value) for value in chain.add.args)
        node = self.recording.call(aten.add.Tensor, tuple(operands))
        if chain.clamp is not None:
            node = self.recording.call(chain.clamp.target, (node, *chain.clamp.args[1:]))
        return self._quantize(node, chain.quantize)

    def _emit_kernel(self, chain: Chain) -> fx.Node:
        op = chain.op
        grid = grid_of(op.args[0])
        x = self.written[op.args[0].args[0]]
        name = f"op{len(self.recording.constants)}"
        weight, scale = weight_for_this_cpu(*(lookup(self.root, attr.target) for attr in op.args[1].args[:2]))
        bias = None
        if len(op.args) > 2 and op.args[2] is not None:
            bias = lookup(self.root, op.args[2].target).detach()
        is_linear = op.target is aten.linear.default
        stride, padding, dilation, groups = ([], [], [], 1) if is_linear else conv_settings(op)
        zero_point = grid.zero_point
        # For an input with a zero point the kernel sums its weights at every call. Their sum is a constant, which the
        # bias takes in, where what is padded has the zero point as well; the few weights of a depthwise convolution
        # are summed in less time than its input is padded in.
        if zero_point != 0 and not is_linear and (weight.shape[1] > 1 or not any(padding)):
            bias = _without_zero_point(weight, scale, bias, grid)
            if any(padding):
                x, padding = self.recording.call(pad, (x, padding, zero_point)), [0] * len(padding)
            zero_point = 0
        if op.target is aten.conv2d.default and is_racy(weight, stride, padding):
            x, stride = self.recording.call(subsample, (x, stride)), [1, 1]
        geometry = () if is_linear else (stride, padding, dilation, groups)
        packed = self._pack(str(op.args[1].args[0].target), weight, scale, (grid.scale, zero_point, *geometry), x)
        inputs = (x, grid.scale, zero_point, *self._weight(name, packed, scale))
        bias_node = None if bias is None else self.recording.constant(f"{name}_bias", bias)
        output = (1.0, 0, torch.float32)
        if chain.grid is not None:
            output = (chain.grid.scale, chain.grid.zero_point, torch.uint8)
        fused = None if chain.clamp is None else unary(op, chain.clamp)
        if chain.residual is not None:
            fused = fused if fused is not None and fused[0] == "relu" else None
            other = grid_of(chain.residual)
            added = (other.scale, other.zero_point, "sum", 1.0, *(fused or (None, [])), "")
            accumulator = self._accumulator(chain)
            args = (*inputs, accumulator, bias_node, *geometry, *output, *added)
            node = self.recording.call(onednn.qconv2d_pointwise.binary, args)
        else:
            kernel = getattr(onednn, KERNELS[op.target]).default
            node = self.recording.call(kernel, (*inputs, bias_node, *geometry, *output, *(fused or ("none", [])), ""))
            if is_linear and 0 in self.recording.shape(x):
                # For no samples the kernel drops the axes between the first and the last.
                node = self.recording.call(aten.reshape.default, (node, [*self.recording.shape(x)[:-1], len(scale)]))
        return node if chain.grid is None else self._clamp(node, chain, chain.grid, fused)

    def _weight(self, name: str, packed: Tensor, scale: Tensor) -> tuple[fx.Node, fx.Node, fx.Node]:
        """A packed weight, its scales and its zero points, as a kernel takes them."""
        zero_point = torch.zeros(len(scale), dtype=torch.int32)
        given = {"weight": packed, "scale": scale.contiguous(), "zero_point": zero_point}
        weight, scales, zero_points = (self.recording.constant(f"{name}_{key}", given[key]) for key in given)
        return weight, scales, zero_points

    def _pack(self, name: str, weight: Tensor, scale: Tensor, settings: tuple[Any, ...], x: fx.Node) -> Tensor:
        """The weight as the kernel wants it for inputs like ``x``."""
        *leading, last = self.recording.shape(x)
        is_linear = len(settings) == 2
        shape = [math.prod(leading), last] if is_linear else [*leading, last]
        sizes = None if 0 in shape else shape  # weights cannot be laid out for an empty batch
        if is_linear:
            packed: Tensor = onednn.qlinear_prepack(weight.contiguous(), sizes)
        else:
            packed = onednn.qconv_prepack(weight, scale, *settings, sizes)
        # Which sizes, and numbers of threads, share a layout is oneDNN's own affair, and another one on each CPU.
        words = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).view(torch.int32).tolist()
        layout = tuple(0 if index in _UNINITIALIZED else word for index, word in enumerate(words))
        return self.packed.setdefault((name, repr(settings), layout), packed)

    def _clamp(self, node: fx.Node, chain: Chain, grid: Grid, fused: Any) -> fx.Node:
        """Clamp integers to the clamp's bounds and the quantizer's grid, where the kernel does not do so."""
        return self._limit(node, *_clamped(chain.clamp if fused is None else None, grid))

    def _limit(self, node: fx.Node, low: int, high: int) -> fx.Node:
        # The kernels' own integers reach from 0 to 255.
        return node if (low, high) == (0, 255) else self.recording.call(aten.clamp_.default, (node, low, high))

    def _accumulator(self, chain: Chain) -> fx.Node:
        """The tensor that the kernel adds to in place: the integers, or a copy if they are read again."""
        node = self.written[chain.residual.args[0]]
        value = self.recording.values[node]
        shape = self._output_shape(chain.op)
        is_own = value.shape == shape and value.is_contiguous(memory_format=torch.channels_last)
        if is_own and not self.liveness.is_still_read(chain.residual.args[0], chain):
            return node
        if value.shape != shape:
            node = self.recording.call(aten.expand.default, (node, list(shape)))
        return self.recording.call(torch.clone, (node,), {"memory_format": torch.channels_last})


def _without_zero_point(weight: Tensor, scale: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """The bias for an input whose zero point is not subtracted: ``b - s_x * s_w * z * sum(w)``."""
    sums = weight.flatten(1).sum(1, dtype=torch.int64).double()
    folded = -grid.scale * grid.zero_point * scale.double() * sums
    return (folded if bias is None else folded + bias.double()).float()


def is_racy(weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether oneDNN's strided 1x1 kernel gets this convolution wrong.

    Its AVX2 form gives different, wrong sums from call to call where several threads run it and the input channels are
    not a multiple of 16 (seen with oneDNN of torch 2.15; right with one thread, with 16 channels, or without a stride).
    """
    return tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1 and not any(padding) and weight.shape[1] % 16 != 0


@torch.no_grad()
def lower(
    graph: fx.Graph,
    root: nn.Module,
    inputs: Sequence[Any],
    watch: Watch | None = None,
    packed: Packed | None = None,
) -> LoweredGraph:
    """Lower a quantize/dequantize graph with constant scales to oneDNN's INT8 kernels, and run it once.

    Args:
        graph: the graph, as :func:`lq.graph.qdq.constant_qparams` or ``torch.export`` gives it.
        root: the module it reads; its tensors must be on the CPU.
        inputs: the values of its placeholders; the lowered graph is for inputs of their sizes.
        watch: called with each quantize node and its integers (uint8), returns the integers to continue with.
        packed: weights of other lowered graphs of the same module, to share.
    """
    return _Lowering(graph, root, inputs, watch, packed).run()
