"""An INT8 network as an AOTInductor package: compiled for this machine's CPU, run without Python model code."""

from __future__ import annotations

import copy
import io
import math
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lq.errors import CompilerError
from lq.formats.aoti.pools import without_ceil_mode
from lq.formats.aoti.shapes import shapes_of
from lq.formats.aoti.sums import without_sums_after_activations
from lq.graph.convolution import conv_settings
from lq.graph.ops import OpKind, clamp_bounds, classify
from lq.graph.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_BUFFER,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    QUANTIZE_BUFFER,
    lookup,
)
from lq.int8.module import Int8Module
from lq.int8.onednn import is_racy, weight_for_this_cpu
from lq.interface.metadata import KEY, Metadata
from lq.util.causes import first_line
from lq.util.cpu import has_onednn_int8
from lq.util.quiet import quiet

aten = torch.ops.aten


def check_compiler() -> None:
    """Check that the C++ compiler that Inductor will call is installed.

    Raises:
        CompilerError: where there is none.
    """
    from torch._inductor import config, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        asked = ", ".join(name for name in config.cpp.cxx if name)
        raise CompilerError(
            f"writing an AOTInductor package takes a C++ compiler, and there is none here (looked for: {asked}); "
            f"install g++ or clang++, name one in the environment variable CXX, or choose the format 'pt2'"
        ) from error


def overflows_here(model: Int8Module) -> bool:
    """Whether the network has weights that this CPU's kernels get wrong, see
    :func:`lq.int8.onednn.weight_for_this_cpu`."""
    nodes = [node for node in model.graph.nodes if node.op == "call_function" and node.target is DEQUANTIZE_WEIGHT]
    weights = [[lookup(model, str(source.target)) for source in node.args[:2]] for node in nodes]
    return any(weight_for_this_cpu(weight, scale)[0] is not weight for weight, scale in weights)


def for_this_cpu(model: Int8Module) -> Int8Module:
    """``model`` as this CPU's kernels compute it correctly: with weights that cannot overflow their sums, and without
    the convolutions for which :func:`lq.int8.onednn.is_racy` holds; ``model`` itself if nothing has to change."""
    if not has_onednn_int8():
        return model
    adjusted = copy.deepcopy(model)
    changed = False
    for node in adjusted.graph.nodes:
        if node.op == "call_function" and node.target is DEQUANTIZE_WEIGHT:
            attributes = [str(source.target) for source in node.args[:2]]
            before = lookup(adjusted, attributes[0]), lookup(adjusted, attributes[1])
            for old, new in zip(before, weight_for_this_cpu(*before), strict=True):
                changed |= old is not new
                old.copy_(new)
        elif node.op == "call_function" and node.target is aten.conv2d.default:
            changed |= _subsample_first(adjusted, node)
    return adjusted if changed else model


def _subsample_first(model: Int8Module, node: Any) -> bool:
    """Let a convolution whose stride the kernels get wrong read every ``stride``-th pixel, with stride 1."""
    stride, padding, *settings = conv_settings(node)
    dequantize, weight = node.args[:2]
    if DEQUANTIZE_WEIGHT is not weight.target or not is_racy(lookup(model, weight.args[0].target), stride, padding):
        return False
    slice_tensor = aten.slice.Tensor
    with model.graph.inserting_before(node):
        integers = dequantize.args[0]
        for axis, step in zip((2, 3), stride, strict=True):
            integers = model.graph.call_function(slice_tensor, (integers, axis, 0, torch.iinfo(torch.int64).max, step))
        sampled = model.graph.call_function(dequantize.target, (integers, *dequantize.args[1:]))
    node.args = (sampled, *node.args[1:3], [1, 1], padding, *settings)
    return True


def for_inductor(model: Int8Module) -> Int8Module:
    """``model`` as Inductor compiles it correctly, and into the fastest kernels."""
    pooled = without_ceil_mode(without_idle_clamps(for_this_cpu(model)))
    return without_sums_after_activations(linear_for_pointwise(pooled))


def without_idle_clamps(model: Int8Module) -> Int8Module:
    """``model`` without the ReLUs and other clamps that let through all that the grid after them has.

    They change no integer: rounding is monotonic. Inductor fuses few clamps into a linear layer's kernel.
    """
    if not any(_is_idle(model, node) for node in model.graph.nodes):
        return model
    adjusted = copy.deepcopy(model)
    for node in list(adjusted.graph.nodes):
        if _is_idle(adjusted, node):
            node.replace_all_uses_with(node.args[0])
            adjusted.graph.erase_node(node)
    return adjusted


def _is_idle(model: Int8Module, node: fx.Node) -> bool:
    if classify(node) is not OpKind.CLAMP or len(node.users) != 1:
        return False
    (quantize,) = node.users
    if quantize.target not in (QUANTIZE, QUANTIZE_BUFFER):
        return False
    low, high = clamp_bounds(node) or (0.0, None)
    bounds = torch.tensor([low, math.inf if high is None else high])
    qparams = [lookup(model, str(arg.target)) if isinstance(arg, fx.Node) else arg for arg in quantize.args[1:]]
    integers: Tensor = quantize.target(bounds, *qparams)
    return integers.tolist() == list(quantize.args[3:5])


def linear_for_pointwise(model: Int8Module) -> Int8Module:
    """``model`` with equivalent linear layers, over the positions of all images, in place of the 1x1 convolutions.

    oneDNN's weight layout for such a convolution depends on the batch, its size and the number of threads, and a
    package, whose weights are laid out once, re-orders them at every call where it differs: 64 ms in a ResNet-50. A
    linear layer, for which it has the same kernel with the same speed, has one layout.
    """
    if not any(_is_pointwise(model, node) for node in model.graph.nodes):
        return model
    adjusted = copy.deepcopy(model)
    rows = _Rows(adjusted, shapes_of(adjusted))
    for node in list(adjusted.graph.nodes):
        if _is_pointwise(adjusted, node):
            rows.take(node)
    rows.copy_accumulators()
    return adjusted


def _is_pointwise(model: Int8Module, node: Any) -> bool:
    if node.op != "call_function" or node.target is not aten.conv2d.default:
        return False
    _, padding, _, groups = conv_settings(node)
    weight = node.args[1]
    if weight.target is not DEQUANTIZE_WEIGHT or groups != 1 or any(padding):
        return False
    return tuple(lookup(model, weight.args[0].target).shape[2:]) == (1, 1)


#: What a kernel does to its results one by one.
_ELEMENTWISE = (
    *(aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default),
    *(aten.add.Tensor, QUANTIZE, QUANTIZE_BUFFER),
)


class _Rows:
    """Writes nodes for images ``(N, C, H, W)`` anew for rows ``(N * H * W, C)``, one for each position."""

    def __init__(self, model: Int8Module, shapes: dict[fx.Node, torch.Size]) -> None:
        self._model = model
        self._graph: fx.Graph = model.graph
        self._shapes = shapes
        self._images: list[fx.Node] = []

    def copy_accumulators(self) -> None:
        """Copy integers that a convolution adds to its own in place: Inductor refuses views of other tensors there."""
        for images in self._images:
            readers = [user for user in images.users if user.target in (DEQUANTIZE, DEQUANTIZE_BUFFER)]
            if any(user.target is aten.add.Tensor for reader in readers for user in reader.users):
                with self._graph.inserting_after(images):
                    # All there are: what Inductor knows to change nothing, such as clone, it takes out again.
                    copied = self._call(aten.clamp.default, images, *readers[0].args[3:5])
                for reader in readers:
                    reader.replace_input_with(images, copied)

    def take(self, node: Any) -> None:
        """Make a linear layer of a 1x1 convolution; what follows it in its kernel is for rows, too."""
        dequantize, weight, *bias = node.args[:3]
        stride, *_ = conv_settings(node)
        with self._graph.inserting_before(node):
            integers = dequantize.args[0]
            channels = self._shapes[dequantize][1]
            for axis, step in zip((2, 3), stride, strict=True):
                if step > 1:
                    integers = self._call(aten.slice.Tensor, integers, axis, 0, torch.iinfo(torch.int64).max, step)
            rows = self._call(dequantize.target, self._flat(integers, channels), *dequantize.args[1:])
            matrix, *qparams = weight.args
            name = str(matrix.target)
            owner = self._model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(
                f"{name.rpartition('.')[2]}_matrix", lookup(self._model, name).flatten(1).contiguous()
            )
            weight = self._call(weight.target, self._graph.get_attr(f"{name}_matrix"), *qparams)
            rows = self._call(aten.linear.default, rows, weight, *bias)
        end, taken = node, [node]
        while (following := self._following(end)) is not None:
            with self._graph.inserting_before(following):
                rows = self._for_rows(following, end, rows)
            end = following
            taken.append(end)
        _, channels, height, width = shape = self._shapes[node]
        with self._graph.inserting_before(end):
            images = self._call(aten.view.default, rows, [-1, height, width, channels])
            images = self._call(aten.permute.default, images, [0, 3, 1, 2])
        self._shapes[images] = shape
        self._images.append(images)
        end.replace_all_uses_with(images)
        for each in reversed(taken):
            self._graph.erase_node(each)

    def _following(self, end: fx.Node) -> Any:
        """What the same kernel does next; None where its results are for others, too, or it ends with integers."""
        if end.target in (QUANTIZE, QUANTIZE_BUFFER) or len(end.users) != 1:
            return None
        (following,) = end.users
        tensors = [node for node in (following, *following.all_input_nodes) if node.op != "get_attr"]
        same = all(self._shapes.get(node) == self._shapes[end] for node in tensors)
        return following if same and following.target in _ELEMENTWISE else None

    def _for_rows(self, node: fx.Node, end: fx.Node, rows: fx.Node) -> fx.Node:
        def for_rows(argument: fx.Node) -> fx.Node:
            if argument is end:
                return rows
            return argument if argument.op == "get_attr" else self._operand(argument)

        replaced = {argument: for_rows(argument) for argument in node.all_input_nodes}
        return self._graph.node_copy(node, replaced.__getitem__)

    def _operand(self, node: Any) -> Any:
        channels = self._shapes[node][1]
        if node.target in (DEQUANTIZE, DEQUANTIZE_BUFFER):  # a kernel reads the integers
            return self._call(node.target, self._flat(node.args[0], channels), *node.args[1:])
        return self._flat(node, channels)

    def _flat(self, images: fx.Node, channels: int) -> Any:
        last = self._call(aten.permute.default, images, [0, 2, 3, 1])
        return self._call(aten.reshape.default, last, [-1, channels])

    def _call(self, target: Any, *args: Any) -> Any:
        return self._graph.call_function(target, args)


#: Whether Inductor is compiling one of our packages: its passes apply to every compilation in the process.
_compiling: ContextVar[bool] = ContextVar("lq_compiling", default=False)


@cache
def _lay_weights_out_for_sizes() -> None:
    """Give Inductor a pass that lays weights out for the sizes that a convolution meets.

    Where the batch size is free, its own pass lays them out for no size, and some kernels re-order them at every call.
    But for 1x1 convolutions (see :func:`linear_for_pointwise`) the layout is the same for all batches.
    """
    from torch._inductor.fx_passes.freezing_patterns import register_freezing_graph_pattern
    from torch._inductor.pattern_matcher import CallFunction, Ignored, Match

    prepack = torch.ops.onednn.qconv_prepack

    def is_ours(match: Match) -> bool:
        return _compiling.get() and match.output_node().args[8] is None

    # After Inductor's own passes, which write the nodes and fuse them.
    @register_freezing_graph_pattern(  # type: ignore[untyped-decorator]
        CallFunction([prepack, prepack.default], *(Ignored() for _ in range(9))), extra_check=is_ours, pass_number=3
    )
    def lay_out(match: Match) -> None:
        node = match.output_node()
        reader: Any = next(iter(node.users))
        value = reader.args[0].meta.get("val")
        if value is not None:
            sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
            if all(isinstance(size, int) for size in sizes):
                node.args = (*node.args[:8], [1, *sizes[1:]])


def write_package(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Compile ``program`` and write it to a ``.pt2`` package.

    Raises:
        CompilerError: where that fails, usually because there is no C++ compiler.
    """
    with quiet("torch.utils._pytree", "torch.utils.cpp_extension", "torch._inductor"):
        # Both take seconds to import, and only this needs them. The first registers Inductor's INT8 passes: without
        # them nothing fuses, and INT8 is much slower than float.
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
        from torch._inductor import aoti_compile_and_package

        settings = {
            "freezing": True,  # weights are packed for the kernels now, not in each process
            "cpp.dynamic_threads": True,  # the number of threads where it runs, not the number here
            "aot_inductor.metadata": {KEY: metadata.to_json()},
        }
        _lay_weights_out_for_sizes()
        compiling = _compiling.set(True)
        package = io.BytesIO()  # not the path: see write_archive
        try:
            with torch.no_grad():
                aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
        except Exception as error:
            raise CompilerError(
                f"AOTInductor cannot compile the network: {first_line(error)}\n"
                f"It needs a C++ compiler (g++ or clang++) on this machine; format='pt2' needs none"
            ) from error
        finally:
            _compiling.reset(compiling)
    path.write_bytes(package.getbuffer())
