"""Lowering of a quantize/dequantize graph to torch's oneDNN INT8 kernels, in process, without a compiler.

``torchao.quantization.pt2e.lowering.lower_pt2e_quantized_to_x86`` does the same through Inductor's private pattern
passes, for one input shape and in seconds; this graph is our own, each pattern is known where it is made, and a lowered
graph serves every batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.graph.codegen import compile_graph
from lq.graph.convolution import conv_settings
from lq.graph.ops import OpKind, classify
from lq.graph.qdq import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE, Grid, lookup, mark_origin, origin
from lq.runtime.cpu import has_vnni

aten = torch.ops.aten
onednn = torch.ops.onednn

_CONVOLUTIONS = {
    aten.conv1d.default: "qconv1d_pointwise",
    aten.conv2d.default: "qconv2d_pointwise",
    aten.conv3d.default: "qconv3d_pointwise",
}


def quantize_activation(x: Tensor, scale: float, zero_point: int, grid_min: int, grid_max: int) -> Tensor:
    """The ``quantize_per_tensor`` operator in few steps, with the channels last as the kernels want them."""
    q = x.mul(1.0 / scale).round_().add_(zero_point).clamp_(grid_min, grid_max)
    if q.dim() == 4:
        return q.to(torch.uint8, memory_format=torch.channels_last)
    return q.to(torch.uint8)


def dequantize_activation(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """The ``dequantize_per_tensor`` operator."""
    return q.to(torch.float32).sub_(zero_point).mul_(scale)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def subsample(q: Tensor, stride: list[int]) -> Tensor:
    """Every ``stride``-th pixel: what a 1x1 convolution with that stride reads."""
    return q[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)


def weight_for_this_cpu(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as the kernels of this CPU can take it without overflow: as it is, or rounded to 7 bits."""
    if has_vnni() or weight.abs().max() <= 64:
        return weight, scale
    return torch.round(weight.float() / 2).to(torch.int8), scale * 2


@dataclass
class _Chain:
    """The nodes of one kernel: weighted op, add, clamp, quantize; all but the first optional."""

    # fx's own type of an argument is a union of everything that one can be; a pattern knows what it looks at.
    op: Any
    add: Any = None
    residual: Any = None  # the dequantize node of the other operand
    clamp: Any = None
    quantize: Any = None

    @property
    def end(self) -> Any:
        return self.quantize or self.clamp or self.add or self.op


@dataclass
class LoweredGraph:
    """A graph whose INT8 operators are kernels, and the packed weights it reads.

    Args:
        graph: reads ``self.module`` (the module it was lowered from) and the constants.
        constants: packed weights, scales and biases by attribute name.
        float_ops: names of the conv and linear operators that found no kernel and compute in float.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    float_ops: list[str] = field(default_factory=list)

    def compile(self, module: nn.Module) -> Callable[..., Any]:
        forward = compile_graph(self.graph, "lowered INT8 graph")
        state = SimpleNamespace(module=module, **self.constants)
        return lambda *inputs: forward(state, *inputs)


def _grid(node: fx.Node) -> Grid:
    """The grid that the kernels, which take uint8 alone, compute a quantize or dequantize node on."""
    return Grid.of(node).unsigned()


def _only_user(node: fx.Node) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_dtype(node: fx.Node) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


class _Lowering:
    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.source = graph
        self.root = root
        self.lowered = LoweredGraph(fx.Graph(), {})
        self.graph = self.lowered.graph
        self.values: dict[fx.Node, fx.Node] = {}
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.chains = {chain.end: chain for node in graph.nodes if (chain := self._match(node)) is not None}
        self.inner = {
            node
            for chain in self.chains.values()
            for node in (chain.op, chain.add, chain.clamp)
            if node is not None and node is not chain.end
        }

    def run(self) -> LoweredGraph:
        for node in self.source.nodes:
            if node in self.inner or _is(node, DEQUANTIZE):
                continue  # a dequantize is written where something reads it in float
            if node in self.chains:
                self.values[node] = self._emit_chain(self.chains[node])
            elif _is(node, QUANTIZE):
                self.values[node] = self._emit_quantize(node)
            else:
                if _is(node, aten.linear.default, *_CONVOLUTIONS):
                    self.lowered.float_ops.append(node.name)
                self.values[node] = self._copy(node, self._read_contiguous if self._is_foreign(node) else self._read)
            mark_origin(self.graph, origin(node))
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        return self.lowered

    # Matching

    def _match(self, node: Any) -> _Chain | None:
        if not _is(node, aten.linear.default, *_CONVOLUTIONS):
            return None
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        if not (_is(x, DEQUANTIZE) and _is(weight, DEQUANTIZE_WEIGHT)) or (bias is not None and bias.op != "get_attr"):
            return None
        chain = _Chain(node)
        user = _only_user(chain.end)
        if node.target is aten.conv2d.default and _is(user, aten.add.Tensor) and len(user.args) == 2:
            other = user.args[1] if user.args[0] is node else user.args[0]
            quantized_after = self._quantize_behind(user)
            if _is(other, DEQUANTIZE) and other is not node and quantized_after:
                chain.add, chain.residual = user, other
                user = _only_user(chain.end)
        if _is(user, aten.relu.default, aten.hardtanh.default) and self._clamps(node, user):
            chain.clamp = user
            user = _only_user(chain.end)
        if _is(user, QUANTIZE):
            chain.quantize = user
        return chain

    def _clamps(self, op: Any, clamp: Any) -> bool:
        """Whether the kernel of ``op`` can do the clamp on its way out."""
        if op.target is aten.conv3d.default:
            # This kernel knows no clamps; but integers from the zero point upwards are a ReLU already.
            quantize = _only_user(clamp)
            if clamp.target is not aten.relu.default or not _is(quantize, QUANTIZE):
                return False
            return _grid(quantize).zero_point == _grid(quantize).quant_min
        return op.target is aten.conv2d.default or clamp.target is aten.relu.default

    def _quantize_behind(self, add: fx.Node) -> bool:
        user = _only_user(add)
        if _is(user, aten.relu.default):
            user = _only_user(user)
        return _is(user, QUANTIZE)

    # Writing

    def _copy(self, node: fx.Node, read: Callable[[fx.Node], fx.Node]) -> fx.Node:
        copied = self.graph.node_copy(node, read)
        copied.meta = {}
        if node.op in ("get_attr", "call_module"):
            copied.target = f"module.{node.target}"
        # The kernels' channels lie last, so what was a view of a contiguous tensor may have to be a copy.
        elif node.op == "call_method" and node.target == "view" and not _has_dtype(node):
            copied.target = "reshape"
        elif _is(node, aten.view.default):
            copied.target = aten.reshape.default
        return copied

    def _read(self, node: Any) -> fx.Node:
        if _is(node, DEQUANTIZE):
            grid = _grid(node)
            integers = self.values[node.args[0]]
            return self.graph.call_function(dequantize_activation, (integers, grid.scale, grid.zero_point))
        return self.values[node]

    def _is_foreign(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a module that is not torch's own."""
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return module is not None and not type(module).__module__.startswith("torch.nn.")

    def _read_contiguous(self, node: Any) -> fx.Node:
        # Code that is called as it is may take views of what was contiguous in the float model.
        return self.graph.call_function(_contiguous, (self._read(node),))

    def _emit_quantize(self, node: Any) -> fx.Node:
        grid = _grid(node)
        x = node.args[0]
        moved = self._moves_integers(x, grid)
        if moved is not None:
            return moved
        args = (self._read(x), grid.scale, grid.zero_point, grid.quant_min, grid.quant_max)
        return self.graph.call_function(quantize_activation, args)

    def _moves_integers(self, x: Any, grid: Grid) -> fx.Node | None:
        """dequantize → move or select → quantize on the same grid: the operator itself, on the integers."""
        source: Any = x.args[0] if x.args else None
        if classify(x) is not OpKind.SAME_SCALE or not _is(source, DEQUANTIZE):
            return None
        if _grid(source) != grid:
            return None
        integers = self.values[source.args[0]]
        if _is(x, aten.max_pool2d.default):
            defaults: tuple[Any, ...] = ([], [0, 0], [1, 1], False)
            given = tuple(x.args[1:])
            kernel, *settings = (*given, *defaults[len(given) - 1 :])
            return self.graph.call_function(torch.ops.quantized.max_pool2d, (integers, kernel, *settings))
        if x.op == "call_module" and not isinstance(self.root.get_submodule(str(x.target)), nn.Flatten | nn.Unflatten):
            return None  # pooling modules have no kernel for integers
        return self._copy(x, lambda node: integers if node is source else self._read(node))

    def _constant(self, name: str, value: Any) -> fx.Node:
        self.lowered.constants[name] = value
        return self.graph.get_attr(name)

    def _emit_chain(self, chain: _Chain) -> fx.Node:
        op = chain.op
        x_grid = _grid(op.args[0])
        x = self.values[op.args[0].args[0]]
        name = f"op{len(self.lowered.constants)}"
        weight_attr, scale_attr = op.args[1].args[:2]
        weight, scale = weight_for_this_cpu(
            lookup(self.root, weight_attr.target),
            lookup(self.root, scale_attr.target),
        )
        bias = op.args[2] if len(op.args) > 2 else None
        scales = self._constant(f"{name}_scale", scale.contiguous())
        zeros = self._constant(f"{name}_zero_point", torch.zeros(len(scale), dtype=torch.int32))
        bias_node = None
        if bias is not None:
            bias_node = self._constant(f"{name}_bias", lookup(self.root, bias.target).detach())
        if chain.quantize is not None:
            out = _grid(chain.quantize)
            output = (out.scale, out.zero_point, torch.uint8)
        else:
            output = (1.0, 0, torch.float32)
        unary, unary_args = "none", list[float]()
        if chain.clamp is not None and op.target is not aten.conv3d.default:
            unary = "relu" if chain.clamp.target is aten.relu.default else "hardtanh"
            unary_args = list(chain.clamp.args[1:]) or ([] if unary == "relu" else [-1.0, 1.0])
        if op.target is aten.linear.default:
            packed = self._constant(f"{name}_weight", onednn.qlinear_prepack(weight.contiguous(), None))
            common = (x, x_grid.scale, x_grid.zero_point, packed, scales, zeros)
            args = (*common, bias_node, *output, unary, unary_args, "")
            return self.graph.call_function(onednn.qlinear_pointwise.default, args)
        stride, padding, dilation, groups = conv_settings(op)
        if op.target is aten.conv2d.default and is_racy(weight, stride, padding):
            x, stride = self.graph.call_function(subsample, (x, stride)), [1, 1]
        packed_weight = onednn.qconv_prepack(
            weight, scale, x_grid.scale, x_grid.zero_point, stride, padding, dilation, groups, None
        )
        packed = self._constant(f"{name}_weight", packed_weight)
        common = (x, x_grid.scale, x_grid.zero_point, packed, scales, zeros)
        settings = (stride, padding, dilation, groups)
        if chain.residual is None:
            kernel = getattr(onednn, _CONVOLUTIONS[op.target]).default
            return self.graph.call_function(kernel, (*common, bias_node, *settings, *output, unary, unary_args, ""))
        r_grid = _grid(chain.residual)
        accumulator = self.values[chain.residual.args[0]]
        if self._is_still_read(chain.residual.args[0], chain):
            # The kernel writes its sum over the operand.
            accumulator = self.graph.call_function(torch.clone, (accumulator,))
        added = (r_grid.scale, r_grid.zero_point, "sum", 1.0, None if unary == "none" else unary, unary_args, "")
        sum_args = (*common, accumulator, bias_node, *settings, *output, *added)
        return self.graph.call_function(onednn.qconv2d_pointwise.binary, sum_args)

    def _is_still_read(self, quantize: Any, chain: _Chain) -> bool:
        """Whether the kernel itself, as its input, or anything executed behind it reads the integers or a view."""
        made_by = quantize.args[0]
        if classify(made_by) is OpKind.SAME_SCALE and not _is(made_by, aten.max_pool2d.default):
            return True  # perhaps itself a view of integers that others read
        position = self.order[chain.end]
        pending, seen = [quantize], set()
        while pending:
            node = pending.pop()
            for user in node.users:
                if user is chain.residual or user in seen:
                    continue
                seen.add(user)
                if user.op == "output":
                    return True
                reads_at = [user] if not _is(user, DEQUANTIZE) else list(user.users)
                if any(self.order[self._written_at(reader)] >= position for reader in reads_at):
                    return True
                pending.extend(reader for reader in reads_at if classify(reader) is OpKind.SAME_SCALE)
        return False

    def _written_at(self, node: fx.Node) -> Any:
        """The node at whose place the kernel that computes ``node`` is written."""
        for end, chain in self.chains.items():
            if node in (chain.op, chain.add, chain.clamp):
                return end
        return node


def is_racy(weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether oneDNN's strided 1x1 kernel is not to be trusted with this convolution.

    Its AVX2 form gives different, wrong sums from call to call where several threads run it and the input channels are
    no multiple of 16 (seen with oneDNN of torch 2.15; right with one thread, with 16 channels, or without a stride).
    """
    return tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1 and not any(padding) and weight.shape[1] % 16 != 0


def lower(graph: fx.Graph, root: nn.Module) -> LoweredGraph:
    """Lower a quantize/dequantize graph with constant scales to oneDNN's INT8 kernels.

    Args:
        graph: the graph, as :func:`lq.graph.qdq.constant_qparams` or ``torch.export`` gives it.
        root: the module it reads; its tensors must be on the CPU.
    """
    return _Lowering(graph, root).run()
