"""An INT8 network as one file: a `torch.export` program (`.pt2`) with its quantize/dequantize pairs."""

from __future__ import annotations

import json
import logging
import operator
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils._pytree import tree_flatten_with_path as key_paths
from torch.utils._pytree import tree_map, tree_unflatten

from lq.files import ensure_writable_dir, write_atomically
from lq.graph.qdq import constant_qparams
from lq.int8 import Int8Module
from lq.report import QuantizationReport

_METADATA = "lq.json"


def _package_version() -> str:
    try:
        return version("lq")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _example(value: Any) -> Any:
    """Zeros of the example's shape: the file keeps its example inputs, and a training image is nobody else's."""
    if not isinstance(value, Tensor):
        return value
    # An export of a batch of one would be for a batch of one.
    return value.new_zeros((2, *value.shape[1:]) if value.dim() else ())


def _dynamic(value: Any) -> Any:
    """Batch and image size may vary, where the network allows it."""
    if not isinstance(value, Tensor):
        return None
    return {axis: Dim.AUTO for axis in range(value.dim()) if axis != 1}


@contextmanager
def _quiet_export() -> Iterator[None]:
    # torch.export tells of every size that it found to be fixed; that is for the network to decide.
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx.experimental")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save(model: Int8Module, path: str | Path) -> None:
    """Write an INT8 network to a ``.pt2`` file.

    The file is a ``torch.export`` program: it loads without the training code, holds no pickles of Python objects, and
    carries the report. It is written beside its final name and renamed.

    Args:
        model: made by :func:`lq.convert`.
        path: the file, ending in ``.pt2``.

    Raises:
        ValueError: where the path does not end in ``.pt2``, or the network cannot be exported (a submodule with
            control flow that depends on data stays Python code; the message has torch's reason).
        OSError: where the path cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path={str(path)!r} must end in .pt2, the format of torch.export")
    if not isinstance(model, Int8Module):
        raise ValueError(f"model is a {type(model).__name__}, not an INT8 module; call lq.convert(model) first")
    ensure_writable_dir(path.parent, "path")
    inputs = {name: tree_map(_example, value) for name, value in model.example_inputs.items()}
    module = fx.GraphModule(model, constant_qparams(model.graph, model))
    try:
        with torch.no_grad(), _quiet_export():
            program = torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes=tuple(tree_map(_dynamic, value) for value in inputs.values()),
                strict=False,
            )
    except Exception as error:
        raise ValueError(f"the network cannot be exported: {error}") from error
    metadata = {
        "lq": _package_version(),
        "inputs": list(inputs),
        "report": None if model.report is None else model.report.to_dict(),
    }
    extra = {_METADATA: json.dumps(metadata)}
    write_atomically(path, lambda beside: torch.export.save(program, beside, extra_files=extra))


def load(path: str | Path) -> Int8Module:
    """Read an INT8 network that :func:`save` wrote; it runs INT8 kernels where the machine has them.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is none of ours, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: no such file")
    extra = {_METADATA: ""}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        program = torch.export.load(path, extra_files=extra)
        metadata = json.loads(extra[_METADATA])
        inputs = dict(zip(metadata["inputs"], program.example_inputs[0], strict=True))
    except Exception as error:
        raise ValueError(f"path={str(path)!r} is no INT8 network written by lq.save, or is damaged: {error}") from error
    module = program.module()
    int8 = Int8Module(module, _plain_graph(module.graph, inputs, program.call_spec.out_spec))
    int8.example_inputs = inputs
    if metadata["report"] is not None:
        int8.report = QuantizationReport.from_dict(metadata["report"])
    return int8


def _plain_graph(graph: fx.Graph, examples: dict[str, Any], out_spec: Any) -> fx.Graph:
    """The exported graph without its checks of the inputs' sizes, with inputs and outputs as in the float model."""
    plain = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    arguments = [(plain.placeholder(name), value) for name, value in examples.items()]
    # torch.export takes and returns flat tuples: a dict or list is taken apart on the way in, and put together again.
    inputs = (_entry(plain, argument, path) for argument, value in arguments for path, _ in key_paths(value)[0])
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "call_module" and str(node.target).startswith("_guards"):
            continue
        else:
            values[node] = plain.node_copy(node, values.__getitem__)
            values[node].meta = {}
    output = next(node for node in plain.nodes if node.op == "output")
    output.args = (tree_unflatten(list(output.args[0]), out_spec),)
    plain.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    plain.lint()
    return plain


def _entry(graph: fx.Graph, argument: fx.Node, path: tuple[Any, ...]) -> fx.Node:
    """The entry of a dict, list or tuple that a key path leads to."""
    for key in path:
        argument = graph.call_function(operator.getitem, (argument, key.key if hasattr(key, "key") else key.idx))
    return argument
