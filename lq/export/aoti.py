"""An INT8 network as an AOTInductor package: compiled for this machine's CPU, run without Python model code."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lq.graph.convolution import conv_settings
from lq.graph.qdq import DEQUANTIZE_WEIGHT, lookup
from lq.int8 import Int8Module
from lq.metadata import KEY, Metadata
from lq.quiet import quiet
from lq.runtime.cpu import has_onednn_int8
from lq.runtime.onednn import is_racy, weight_for_this_cpu


class CompilerError(RuntimeError):
    """AOTInductor could not compile the network."""


def check_compiler() -> None:
    """Check that there is the C++ compiler that Inductor will ask for.

    Raises:
        CompilerError: where there is none.
    """
    from torch._inductor import config, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        asked = ", ".join(name for name in config.cpp.cxx if name)
        raise CompilerError(
            f"an AOTInductor package takes a C++ compiler to write, and there is none here (looked for: {asked}); "
            f"install g++ or clang++, name one in the environment variable CXX, or choose the format 'pt2'"
        ) from error


def overflows_here(model: Int8Module) -> bool:
    """Whether the network has weights that this CPU's kernels are not right with, see
    :func:`lq.runtime.onednn.weight_for_this_cpu`."""
    nodes = [node for node in model.graph.nodes if node.op == "call_function" and node.target is DEQUANTIZE_WEIGHT]
    weights = [[lookup(model, str(source.target)) for source in node.args[:2]] for node in nodes]
    return any(weight_for_this_cpu(weight, scale)[0] is not weight for weight, scale in weights)


def for_this_cpu(model: Int8Module) -> Int8Module:
    """``model`` as this CPU's kernels compute it right: with weights that their sums cannot overflow with, and without
    the convolutions that :func:`lq.runtime.onednn.is_racy` knows; itself where it is like that already."""
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
        elif node.op == "call_function" and node.target is torch.ops.aten.conv2d.default:
            changed |= _subsample_first(adjusted, node)
    return adjusted if changed else model


def _subsample_first(model: Int8Module, node: Any) -> bool:
    """Let a convolution that is not to be trusted with its stride read every so manieth pixel instead."""
    stride, padding, *settings = conv_settings(node)
    dequantize, weight = node.args[:2]
    if DEQUANTIZE_WEIGHT is not weight.target or not is_racy(lookup(model, weight.args[0].target), stride, padding):
        return False
    slice_tensor = torch.ops.aten.slice.Tensor
    with model.graph.inserting_before(node):
        integers = dequantize.args[0]
        for axis, step in zip((2, 3), stride, strict=True):
            integers = model.graph.call_function(slice_tensor, (integers, axis, 0, torch.iinfo(torch.int64).max, step))
        sampled = model.graph.call_function(dequantize.target, (integers, *dequantize.args[1:]))
    node.args = (sampled, *node.args[1:3], [1, 1], padding, *settings)
    return True


def write_package(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Compile ``program`` and write it to a ``.pt2`` package.

    Raises:
        CompilerError: where that fails; mostly for want of a C++ compiler.
    """
    with quiet("torch.utils._pytree", "torch.utils.cpp_extension", "torch._inductor"):
        # Both take seconds to import, and only this needs them. The first registers Inductor's INT8 passes: without
        # them nothing fuses, and INT8 is slower than float by far.
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
        from torch._inductor import aoti_compile_and_package

        settings = {
            "freezing": True,  # weights are packed for the kernels now and not in each process
            "cpp.dynamic_threads": True,  # as many threads as where it runs, not as here
            "aot_inductor.metadata": {KEY: metadata.to_json()},
        }
        package = io.BytesIO()  # and not the path: see write_archive
        try:
            with torch.no_grad():
                aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
        except Exception as error:
            raise CompilerError(
                f"AOTInductor cannot compile the network: {error}\nIt needs a C++ compiler (g++ or clang++) on this "
                f"machine; format='pt2' needs none"
            ) from error
    path.write_bytes(package.getbuffer())
