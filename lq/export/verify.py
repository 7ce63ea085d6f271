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

#: Largest mean difference of a layer's integers, in steps of its grid.
LAYER_TOLERANCE = 0.5


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


def check_onnx(model: Any, names: list[str], expected: list[Tensor], inputs: list[Tensor]) -> None:
    """Run an ONNX model as it is written, and compare its integers layer by layer.

    ONNX Runtime fuses nothing here, so that every quantize/dequantize pair is computed and can be seen.

    Args:
        model: the ``onnx.ModelProto``.
        names: names of the integers in it, see :func:`lq.export.onnx.to_onnx`.
        expected: the simulation's integers under these names.
        inputs: the flat inputs.

    Raises:
        ExportMismatchError: where they differ; it names the first layer that does.
    """
    import onnx

    ort = import_onnxruntime()
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    produced = {output for node in model.graph.node for output in node.output}
    outputs = {value.name for value in model.graph.output}
    wanted = {f"{name}.quantized": value for name, value in zip(names, expected, strict=True)}
    wanted = {name: value for name, value in wanted.items() if name in produced}
    for name, value in wanted.items():
        if name not in outputs:
            dtype = onnx.TensorProto.UINT8 if value.dtype is torch.uint8 else onnx.TensorProto.INT8
            seen.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(seen.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: tensor.numpy(force=True) for value, tensor in zip(model.graph.input, inputs, strict=True)}
    for name, actual in zip(wanted, session.run(list(wanted), feeds), strict=True):
        steps = np.abs(actual.astype(np.int32) - wanted[name].numpy().astype(np.int32))
        if steps.mean() > LAYER_TOLERANCE:
            raise ExportMismatchError(
                f"the ONNX file differs from the INT8 network from {name.removesuffix('.quantized')!r} on: its "
                f"integers are {steps.mean():.2f} steps apart in the mean, {steps.max()} at most"
            )

