"""An INT8 network as an AOTInductor package: compiled for this machine's CPU, run without Python model code."""

from __future__ import annotations

import copy
import io
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lq.errors import CompilerError
from lq.formats.pt2.write import examples
from lq.graph.convolution import conv_settings
from lq.graph.qdq import DEQUANTIZE_WEIGHT, constant_qparams, lookup
from lq.int8.module import Int8Module
from lq.int8.onednn import is_racy, weight_for_this_cpu
from lq.interface.metadata import KEY, Metadata
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


class _Shapes(fx.Interpreter):
    """The shape of each tensor of the graph."""

    def __init__(self, model: Int8Module) -> None:
        graph = constant_qparams(model.graph, model)
        super().__init__(model, graph=graph)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = value.shape
        return value


def linear_for_single_positions(model: Int8Module) -> Int8Module:
    """``model`` with equivalent linear layers in place of the 1x1 convolutions whose output is a single position.

    oneDNN's weight layout for such a convolution depends on whether the batch is one and on the number of threads, and
    a package, whose weights are laid out once, re-orders them at every call: 40 ms for 512x512. A linear layer has one
    layout.
    """
    with torch.no_grad():
        shapes = _Shapes(model)
        shapes.run(*examples(model).values())
    pointwise = []
    for node in shapes.graph.nodes:
        if node.op != "call_function" or node.target is not aten.conv2d.default or node.name not in shapes.shapes:
            continue
        _, padding, _, groups = conv_settings(node)
        weight = node.args[1]
        if weight.target is not DEQUANTIZE_WEIGHT or groups != 1 or any(padding):
            continue
        is_pointwise = tuple(lookup(model, weight.args[0].target).shape[2:]) == (1, 1)
        if is_pointwise and tuple(shapes.shapes[node.name][2:]) == (1, 1):
            pointwise.append(node.name)
    if not pointwise:
        return model
    adjusted = copy.deepcopy(model)
    for node in list(adjusted.graph.nodes):
        if node.name in pointwise:
            _make_linear(adjusted, node)
    return adjusted


def _make_linear(model: Int8Module, node: Any) -> None:
    dequantize, weight, *bias = node.args[:3]
    graph = model.graph
    with graph.inserting_before(node):
        integers = dequantize.args[0]
        for _ in (2, 3):  # the one position that it reads, whatever the stride
            integers = graph.call_function(aten.select.int, (integers, 2, 0))
        flat = graph.call_function(dequantize.target, (integers, *dequantize.args[1:]))
        matrix, *qparams = weight.args
        name = str(matrix.target)
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(f"{name.rpartition('.')[2]}_matrix", lookup(model, name).flatten(1).contiguous())
        matrix = graph.get_attr(f"{name}_matrix")
        weight = graph.call_function(weight.target, (matrix, *qparams))
        product = graph.call_function(aten.linear.default, (flat, weight, *bias))
        for axis in (2, 3):
            product = graph.call_function(aten.unsqueeze.default, (product, axis))
    node.replace_all_uses_with(product)
    graph.erase_node(node)


#: Whether Inductor is compiling one of our packages: its passes apply to every compilation in the process.
_compiling: ContextVar[bool] = ContextVar("lq_compiling", default=False)


@cache
def _lay_weights_out_for_sizes() -> None:
    """Give Inductor a pass that lays weights out for the sizes that a convolution meets.

    Where the batch size is free, its own pass lays them out for no size, and some kernels re-order them at every call.
    Except for a batch of one (see :func:`linear_for_single_positions`) the layout is the same for all batches.
    """
    from torch._inductor.fx_passes.freezing_patterns import register_freezing_graph_pattern
    from torch._inductor.pattern_matcher import CallFunction, Ignored, Match

    prepack = torch.ops.onednn.qconv_prepack

    def is_ours(match: Match) -> bool:
        return _compiling.get() and match.output_node().args[8] is None

    # After Inductor's own passes, which write the nodes and fuse them.
    @register_freezing_graph_pattern(  # type: ignore[untyped-decorator]
        CallFunction([prepack, prepack.default], *[Ignored()] * 9), extra_check=is_ours, pass_number=3
    )
    def lay_out(match: Match) -> None:
        node = match.output_node()
        reader: Any = next(iter(node.users))
        value = reader.args[0].meta.get("val")
        if value is not None:
            sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
            node.args = (*node.args[:8], sizes if all(isinstance(size, int) for size in sizes) else None)


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
                f"AOTInductor cannot compile the network: {error}\nIt needs a C++ compiler (g++ or clang++) on this "
                f"machine; format='pt2' needs none"
            ) from error
        finally:
            _compiling.reset(compiling)
    path.write_bytes(package.getbuffer())
