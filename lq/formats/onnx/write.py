"""An INT8 network as an ONNX file with QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lq.errors import MissingRuntimeError
from lq.formats.onnx.engine_forms import (
    move_at_once,
    own_zero_points,
    pad_in_convolutions,
    pool_globally,
    quantize_biases,
)
from lq.formats.onnx.read import CHECKSUM
from lq.interface.metadata import KEY, Metadata
from lq.util.causes import first_line, root_cause
from lq.util.distribution import install

#: ONNX Runtime, OpenVINO and TensorRT 10 all read this opset.
OPSET = 18


def import_onnx() -> Any:
    """The ``onnx`` package; also checks for onnxscript, which torch's exporter needs.

    Raises:
        MissingRuntimeError: where one of them is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingRuntimeError(
            f"the ONNX export needs onnx and onnxscript ({error}); install them with: {install('onnx')}"
        ) from error
    return onnx


def to_onnx(
    program: ExportedProgram, sites: list[str], metadata: Metadata, *, opset: int = OPSET, int32_bias: bool = True
) -> Any:
    """The ``onnx.ModelProto`` of a quantize/dequantize program.

    Weights are INT8 initializers that a DequantizeLinear reads. So are biases, as INT32 with the scale ``s_x * s_w``,
    which engines need to fuse a convolution and its bias into an INT8 kernel (TensorRT wants float biases instead).
    The batch size is free.

    Args:
        program: from :func:`lq.formats.pt2.write.export_program`.
        sites: names for the outputs of its quantize nodes, in the order of the graph.
        metadata: goes into the file's metadata properties.
        opset: version of the ONNX operator set.
        int32_bias: whether biases are INT32.

    Raises:
        ValueError: where torch's exporter cannot express the network, or does not know that opset.
    """
    onnx = import_onnx()
    names = [spec.name for spec in metadata.tensors]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            exported = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, input_names=names, verbose=False, optimize=True
            )
    except Exception as error:
        reason = first_line(root_cause(error))  # around it torch puts advice to its own developers
        raise ValueError(f"the network cannot be exported to ONNX opset {opset}: {reason}") from error
    assert exported is not None
    model = exported.model_proto
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if written != opset:
        raise ValueError(
            f"opset={opset} is not supported by torch's exporter here, which wrote opset {written} instead"
        )
    _drop_debugging_information(model)
    _name_free_sizes(model)
    pool_globally(onnx, model)
    _rename_quantized(model, sites)
    _name_constant_outputs(onnx, model)
    move_at_once(onnx, model)
    pad_in_convolutions(onnx, model)
    own_zero_points(model)
    if int32_bias:
        quantize_biases(onnx, model)
    model.producer_name = "lq"
    model.producer_version = metadata.lq
    checksum = hashlib.sha256(model.graph.SerializeToString()).hexdigest()
    onnx.helper.set_model_props(model, {KEY: metadata.to_json(), CHECKSUM: checksum, **_readable(metadata)})
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:  # of an operator that came with a later opset, such as DeformConv
        raise ValueError(f"the network cannot be exported to ONNX opset {opset}: {first_line(error)}") from error
    return model


def _readable(metadata: Metadata) -> dict[str, str]:
    """What a person looks for in a model viewer, in addition to the JSON that lq reads."""
    properties = {"lq.version": metadata.lq, "lq.target": metadata.target}
    if metadata.labels is not None:
        properties["labels"] = "\n".join(metadata.labels)
    if metadata.preprocessing is not None:
        properties["preprocessing"] = repr(dict(metadata.preprocessing))
    return properties


def _drop_debugging_information(model: Any) -> None:
    """Stack traces of the exporting machine, file paths included."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
        initializer.doc_string = ""


def _name_free_sizes(model: Any) -> None:
    symbols: dict[str, str] = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param") and re.fullmatch(r"s\d+", axis.dim_param):
                axis.dim_param = symbols.setdefault(axis.dim_param, f"batch_{len(symbols)}" if symbols else "batch")


def _name_constant_outputs(onnx: Any, model: Any) -> None:
    """What the network returns of its constants, such as anchors, is an output of an operator: ONNX wants that."""
    made = {name for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        if output.name not in made:
            constant, name = output.name, f"{output.name}_returned"
            output.name = name
            model.graph.node.append(onnx.helper.make_node("Identity", [constant], [name]))
            made.add(name)


def _rename_quantized(model: Any, sites: list[str]) -> None:
    """Name integers after their tensor in the float model, and nodes after their weight's layer."""
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            match = re.fullmatch(r"quantize_per_tensor(?:_(\d+))?", node.output[0])
            if match is not None:
                renamed[node.output[0]] = f"{sites[int(match.group(1) or 0)]}.quantized"
    taken = {name for node in model.graph.node for name in node.output} - set(renamed)
    renamed = {old: new for old, new in renamed.items() if new not in taken}
    made_by = {name: node for node in model.graph.node for name in node.output}
    calls: dict[str, int] = {}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        dequantize = made_by.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if dequantize is not None and dequantize.input[0].endswith(".weight"):
            layer = dequantize.input[0].removesuffix(".weight")
            calls[layer] = calls.get(layer, 0) + 1
            node.name = layer if calls[layer] == 1 else f"{layer}:{calls[layer]}"  # a further call of the layer
    for value in model.graph.value_info:
        value.name = renamed.get(value.name, value.name)


def write_onnx(model: Any, path: Path) -> None:
    """Write a model to one file."""
    import_onnx().save(model, str(path))
