"""An INT8 network as an AOTInductor package: compiled for this machine's CPU, run without Python model code."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor import aoti_compile_and_package
from torch.export import ExportedProgram

from lq.graph.qdq import DEQUANTIZE_WEIGHT, lookup
from lq.int8 import Int8Module
from lq.metadata import KEY, Metadata
from lq.runtime.onednn import weight_for_this_cpu


class CompilerError(RuntimeError):
    """AOTInductor could not compile the network."""


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [
        logging.getLogger(name) for name in ("torch.utils._pytree", "torch.utils.cpp_extension", "torch._inductor")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def for_this_cpu(model: Int8Module) -> Int8Module:
    """``model`` with weights that this CPU's kernels can take without overflow; itself where it has them already."""
    adjusted = copy.deepcopy(model)
    changed = False
    for node in adjusted.graph.nodes:
        if node.op == "call_function" and node.target is DEQUANTIZE_WEIGHT:
            attributes = [str(source.target) for source in node.args[:2]]
            before = lookup(adjusted, attributes[0]), lookup(adjusted, attributes[1])
            for old, new in zip(before, weight_for_this_cpu(*before), strict=True):
                changed |= old is not new
                old.copy_(new)
    return adjusted if changed else model


def write_package(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Compile ``program`` and write it to a ``.pt2`` package.

    Raises:
        CompilerError: where that fails; mostly for want of a C++ compiler.
    """
    with _quiet():
        # Registers Inductor's INT8 passes: without them nothing fuses, and INT8 is slower than float by far.
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

        settings = {
            "freezing": True,  # weights are packed for the kernels now and not in each process
            "cpp.dynamic_threads": True,  # as many threads as where it runs, not as here
            "aot_inductor.metadata": {KEY: metadata.to_json()},
        }
        try:
            with torch.no_grad():
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        except Exception as error:
            raise CompilerError(
                f"AOTInductor cannot compile the network: {error}\nIt needs a C++ compiler (g++ or clang++) on this "
                f"machine; format='pt2' needs none"
            ) from error
