"""Verification: an exported file against the network it was exported from, before anybody deploys it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lq.graph.interpret import node_values
from lq.graph.qdq import QUANTIZE, constant_qparams
from lq.int8 import Int8Module
from lq.runtime.onnxruntime import import_onnxruntime

#: Largest difference of the outputs, root mean square, as a share of the outputs': two engines round ties to
#: neighbouring integers here and there, and that spreads through the layers; a wrong scale or bias does far more.
OUTPUT_TOLERANCE = 0.1

#: Largest mean difference of a layer's integers, in steps of its grid, where it reads the same integers: those that
#: lie next to the middle between two may round to either.
LAYER_TOLERANCE = 0.05

#: Largest difference of the outputs, root mean square, as a share of the outputs', where the same operators compute
#: them from the same inputs.
FLOAT_TOLERANCE = 1e-3


class ExportMismatchError(RuntimeError):
    """An exported file does not compute what the network does."""


@dataclass(frozen=True)
class Verification:
    """How far an engine's outputs are from the simulation of the INT8 network.

    Args:
        runtime: the engine.
        samples: on so many samples.
        max_difference: largest absolute difference of an output.
        relative_difference: root mean square of the differences over that of the outputs.
        top1_agreement: share of the samples with the same largest output, in [0, 1]; None where the outputs are not
            one matrix of scores.
    """

    runtime: str
    samples: int
    max_difference: float
    relative_difference: float
    top1_agreement: float | None

    def __str__(self) -> str:
        text = f"{self.runtime}: largest difference {self.max_difference:.3g}, RMS {self.relative_difference:.2%}"
        if self.top1_agreement is not None:
            text += f", top-1 agreement {self.top1_agreement:.1%}"
        return f"{text} ({self.samples} samples)"


def compare(runtime: str, outputs: Any, expected: Any) -> Verification:
    """Outputs of an engine against those of the simulation, in any nesting."""
    pairs = [
        (actual.double(), wanted.double())
        for actual, wanted in zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
        if isinstance(wanted, Tensor)
    ]
    for actual, wanted in pairs:
        if actual.shape != wanted.shape:
            raise ExportMismatchError(
                f"{runtime} returns an output of shape {tuple(actual.shape)} instead of {tuple(wanted.shape)}"
            )
    error = torch.cat([(actual - wanted).reshape(-1) for actual, wanted in pairs])
    size = torch.cat([wanted.reshape(-1) for _, wanted in pairs])
    scores = pairs[0][1]
    agreement = None
    if len(pairs) == 1 and scores.dim() == 2 and scores.shape[1] > 1:
        agreement = float((pairs[0][0].argmax(1) == scores.argmax(1)).double().mean())
    relative = float(error.square().mean().sqrt() / size.square().mean().sqrt().clamp(min=1e-12))
    samples = len(scores) if scores.dim() else 1
    return Verification(runtime, samples, float(error.abs().max()), relative, agreement)


def simulated(model: Int8Module, inputs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """The outputs of the simulation, and the integers of each quantize node in the order of the graph."""
    graph = constant_qparams(model.graph, model)
    values = node_values(graph, model, inputs)
    integers = [values[node] for node in graph.nodes if node.target is QUANTIZE]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return values[output], integers


def check_program(loaded: Int8Module, inputs: Mapping[str, Any], outputs: Any) -> None:
    """Compare what a ``.pt2`` program computes as it is written, which takes no kernels, with what the simulation does.

    Raises:
        ExportMismatchError: where they differ.
    """
    execution, loaded.execution = loaded.execution, "simulation"
    found = compare("the .pt2 file", loaded(**inputs), outputs)
    loaded.execution = execution
    if found.relative_difference > FLOAT_TOLERANCE:
        raise ExportMismatchError(f"the .pt2 file differs from the INT8 network: {found}")


def check_onnx(model: Any, names: list[str], expected: list[Tensor], outputs: Any, inputs: list[Tensor]) -> None:
    """Compare what an ONNX model computes in each layer with what the simulation does.

    ONNX Runtime fuses nothing here, and each layer is given the simulation's integers to read: a rounding that went
    the other way further up cannot hide behind, or be taken for, a layer that is wrong.

    Args:
        model: the ``onnx.ModelProto``.
        names: names of the integers in it, see :func:`lq.export.onnx.to_onnx`.
        expected: the simulation's integers under these names.
        outputs: the simulation's outputs.
        inputs: the flat inputs.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
    """
    import onnx

    ort = import_onnxruntime()
    apart = onnx.ModelProto()
    apart.CopyFrom(model)
    wanted = {f"{name}.quantized": value for name, value in zip(names, expected, strict=True)}
    feeds = {value.name: tensor.numpy(force=True) for value, tensor in zip(model.graph.input, inputs, strict=True)}
    computed = {}
    for node in apart.graph.node:
        name = node.output[0]
        if node.op_type == "QuantizeLinear" and name in wanted:
            dtype = onnx.TensorProto.UINT8 if wanted[name].dtype is torch.uint8 else onnx.TensorProto.INT8
            node.output[0] = computed[name] = f"{name}.computed"
            apart.graph.output.append(onnx.helper.make_tensor_value_info(computed[name], dtype, None))
            apart.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, wanted[name].shape))
            feeds[name] = wanted[name].contiguous().numpy()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(apart.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = dict(zip((value.name for value in apart.graph.output), session.run(None, feeds), strict=True))
    for name, output in computed.items():
        steps = np.abs(results[output].astype(np.int32) - feeds[name].astype(np.int32))
        if steps.mean() > LAYER_TOLERANCE:
            raise ExportMismatchError(
                f"the ONNX file differs from the INT8 network in the layer that ends in "
                f"{name.removesuffix('.quantized')!r}: its integers are {steps.mean():.2f} steps apart in the mean, "
                f"{steps.max()} at most"
            )
    found = compare("the ONNX file", [torch.from_numpy(results[value.name]) for value in model.graph.output], outputs)
    if found.relative_difference > FLOAT_TOLERANCE:
        raise ExportMismatchError(f"the ONNX file differs from the INT8 network in its last layer: {found}")
