"""An INT8 network as a `torch.export` program with its quantize/dequantize pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lq.files import write_archive
from lq.graph.qdq import constant_qparams
from lq.int8 import Int8Module
from lq.metadata import KEY, Metadata
from lq.quiet import quiet

aten = torch.ops.aten


def examples(model: Int8Module) -> dict[str, Any]:
    """Zeros of the example inputs' shapes: a file keeps its example inputs, and a training image is nobody else's."""

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # An export of a batch of one would be for a batch of one.
        return value.new_zeros((2, *value.shape[1:]) if value.dim() else ())

    return {name: tree_map(zeros, value) for name, value in model.example_inputs.items()}


#: They tell of every size that turned out to be fixed; that is for the network to decide.
_TALKATIVE = ("torch.export", "torch._export", "torch.fx.experimental")


def _without_circular_padding(graph: fx.Graph) -> fx.Graph:
    """Circular padding in ``graph`` as slices put together, which every engine knows."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (F.pad, aten.pad.default):
            continue
        given: dict[str, Any] = dict(zip(("input", "pad", "mode"), node.args, strict=False)) | dict(node.kwargs)
        if given.get("mode") != "circular":
            continue
        value = given["input"]
        with graph.inserting_before(node):
            for index, (before, after) in enumerate(zip(given["pad"][::2], given["pad"][1::2], strict=True)):
                axis = -1 - index  # F.pad counts from the last
                parts = [value]
                if before:
                    parts.insert(0, graph.call_function(aten.slice.Tensor, (value, axis, -before)))
                if after:
                    parts.append(graph.call_function(aten.slice.Tensor, (value, axis, 0, after)))
                value = graph.call_function(aten.cat.default, (parts, axis)) if len(parts) > 1 else value
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    return graph


def export_program(model: Int8Module, *, free_sizes: bool) -> ExportedProgram:
    """The network as a program, its batch size free where the network allows that.

    Args:
        model: the INT8 network.
        free_sizes: whether the sizes of the other axes, but for the channels, are free as well. Engines that compile
            ahead of time make better kernels for sizes that they know.

    Raises:
        ValueError: where the network cannot be exported (a submodule with control flow that depends on data stays
            Python code); the message has torch's reason.
    """

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        axes = [axis for axis in range(value.dim()) if axis != 1] if free_sizes else range(min(value.dim(), 1))
        return dict.fromkeys(axes, Dim.AUTO)

    inputs = examples(model)
    module = fx.GraphModule(model, _without_circular_padding(constant_qparams(model.graph, model)))
    try:
        with torch.no_grad(), quiet(*_TALKATIVE):
            return torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes=tuple(tree_map(free, value) for value in inputs.values()),
                strict=False,
            )
    except Exception as error:
        raise ValueError(f"the network cannot be exported: {error}") from error


def write_program(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Write a ``.pt2`` file that loads without lq and without the training code."""
    extra_files = {KEY: metadata.to_json()}
    # torch takes a weight in another memory format, of a layer in float, for a part of some larger tensor, and warns.
    weights = program.state_dict
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and not weight.is_contiguous():
            contiguous = weight.detach().contiguous()
            weights[name] = nn.Parameter(contiguous, False) if isinstance(weight, nn.Parameter) else contiguous
    write_archive(path, lambda buffer: torch.export.save(program, buffer, extra_files=extra_files))
