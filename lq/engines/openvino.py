"""Running an ONNX file with OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.engines.base import InferenceModel, import_optional
from lq.errors import UnsuitableError
from lq.formats.onnx.read import metadata_of, unreadable

_ONNX_TYPES = {"f32": "tensor(float)", "i64": "tensor(int64)", "i32": "tensor(int32)", "boolean": "tensor(bool)"}

#: Batch sizes whose compiled networks are kept: a compiled network holds its own copy of the weights.
_KEPT = 4


def import_openvino() -> Any:
    """The package.

    Raises:
        MissingRuntimeError: where it is not installed.
    """
    return import_optional("openvino", "OpenVINO", "openvino")


@cache
def shared_core(openvino: Any) -> Any:
    """The one ``Core`` of this process, which is never freed.

    Each has a stack for signal handlers of its own, which it makes the process's (2026.4: the CPU plugin, on CPUs with
    AVX-512), and puts the former one back when it is freed. Of two that are freed in the order in which they were made,
    the second puts back what the first has freed: the next signal, as that of a DataLoader's worker that ends, then
    kills the process or overwrites what has come to lie there.
    """
    return openvino.Core()


class OpenVinoModel(InferenceModel):
    """A network in an ONNX file on OpenVINO's CPU plugin.

    It is compiled for each shape it meets: kernels for a known shape are faster.
    """

    runtime = "openvino"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self._core = shared_core(import_openvino())
        try:
            self._model = self._core.read_model(str(path))
        except Exception as error:
            raise unreadable(path, "OpenVINO", error) from error
        if _joins_signed(self._model):
            raise UnsuitableError(
                f"path={str(path)!r} has concatenations and signed activations, which OpenVINO computes wrongly "
                f"together: run it with runtime='onnxruntime', or prepare the network for target='x86'"
            )
        inputs = [
            (port.any_name, _ONNX_TYPES.get(port.element_type.get_type_name(), "?"), _sizes(port.partial_shape))
            for port in self._model.inputs
        ]
        metadata = metadata_of(path, _properties(self._model), inputs)
        # On CPUs with BF16 OpenVINO computes what is not INT8 in that, with 8 bits of the numbers: a gate between INT8
        # layers is then off by 8 % (2026.4).
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if _has_linear_layers_without_bias(self._model):
            # Two linear layers that OpenVINO computes together are wrong from batches of 4 on where the first one has
            # no bias (2026.4).
            self._settings["SNIPPETS_MODE"] = "DISABLE"
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._requests: dict[tuple[torch.Size, ...], Any] = {}
        super().__init__(metadata, threads)

    def _run(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if any(0 in value.shape for value in inputs):
            return self._run_empty(inputs)
        request = self._request(tuple(value.shape for value in inputs))
        # The next call overwrites the request's output buffers.
        results = request.infer([value.numpy(force=True) for value in inputs], share_inputs=True, share_outputs=False)
        return [torch.from_numpy(output) for output in results.to_tuple()]

    def _run_empty(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Compiled for a size of 0 some networks end the process (2026.4): what one sample gives tells the shapes."""
        if not all(value.dim() and value.shape[0] == 0 and 0 not in value.shape[1:] for value in inputs):
            shapes = [tuple(value.shape) for value in inputs]
            raise ValueError(f"OpenVINO runs no inputs of the shapes {shapes}: of the sizes only the batch's may be 0")
        return [output[:0] for output in self._run([value.new_zeros(1, *value.shape[1:]) for value in inputs])]

    def _request(self, shapes: tuple[torch.Size, ...]) -> Any:
        if shapes not in self._requests:
            self._model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
            compiled = self._core.compile_model(self._model, "CPU", self._settings)
            while len(self._requests) >= _KEPT:
                del self._requests[next(iter(self._requests))]
            self._requests[shapes] = compiled.create_infer_request()
        return self._requests[shapes]


def _joins_signed(model: Any) -> bool:
    """Whether the network has concatenations and signed activations: OpenVINO 2026.4 gives the parts of one that follow
    a ReLU unsigned integers, and others signed ones, and is off by a third of the values and more. Of a DenseNet's the
    compiler ends the process."""
    types = [(operator.get_type_name(), _type_of(operator)) for operator in model.get_ops()]
    quantized = [_type_of(operator) for operator in model.get_ops() if _is_quantize(operator)]
    return ("Concat", "f32") in types and "i8" in quantized


def _has_linear_layers_without_bias(model: Any) -> bool:
    """Whether there are several linear layers, and one of them has no bias."""
    linear = [op for op in model.get_ops() if op.get_type_name() == "MatMul" and _is_constant(op.input_value(1))]
    readers = [[reader.get_node().get_type_name() for reader in op.output(0).get_target_inputs()] for op in linear]
    return len(linear) > 1 and any("Add" not in types for types in readers)


def _is_constant(value: Any) -> bool:
    """Whether a value does not depend on the network's inputs."""
    pending = [value.get_node()]
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Parameter":
            return False
        pending += [each.get_node() for each in node.input_values()]
    return True


def _type_of(operator: Any) -> str:
    return str(operator.output(0).get_element_type().get_type_name()) if operator.outputs() else ""


def _is_quantize(operator: Any) -> bool:
    """Whether an operator ends an ONNX file's QuantizeLinear."""
    if operator.get_type_name() != "Convert":
        return False
    return bool(operator.input_value(0).get_node().get_type_name() == "FakeQuantize")


def _sizes(shape: Any) -> list[int | None]:
    return [None if axis.is_dynamic else axis.get_length() for axis in shape]


def _properties(model: Any) -> dict[str, str]:
    """The ONNX file's metadata properties, which OpenVINO keeps under ``framework``."""
    if not model.has_rt_info(["framework"]):
        return {}
    return {str(key): str(value) for key, value in model.get_rt_info(["framework"]).value.items()}
