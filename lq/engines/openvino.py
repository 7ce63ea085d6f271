"""Running an ONNX file with OpenVINO."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.engines.base import InferenceModel, import_optional
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


#: Compiles the file in the first argument for the shapes in the second.
_COMPILE = """
import json, sys
import openvino
core = openvino.Core()
model = core.read_model(sys.argv[1])
model.reshape(dict(enumerate(json.loads(sys.argv[2]))))
core.compile_model(model, "CPU")
"""


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
        inputs = [
            (port.any_name, _ONNX_TYPES.get(port.element_type.get_type_name(), "?"), _sizes(port.partial_shape))
            for port in self._model.inputs
        ]
        metadata = metadata_of(path, _properties(self._model), inputs)
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._requests: dict[tuple[torch.Size, ...], Any] = {}
        self._path = path
        self._may_crash = _joins_integers(self._model)
        super().__init__(metadata, threads)

    def _run(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        request = self._request(tuple(value.shape for value in inputs))
        # The next call overwrites the request's output buffers.
        results = request.infer([value.numpy(force=True) for value in inputs], share_inputs=True, share_outputs=False)
        return [torch.from_numpy(output) for output in results.to_tuple()]

    def _request(self, shapes: tuple[torch.Size, ...]) -> Any:
        if shapes not in self._requests:
            if self._may_crash:
                _check_in_child(self._path, shapes)
                self._may_crash = False
            self._model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
            compiled = self._core.compile_model(self._model, "CPU", self._settings)
            while len(self._requests) >= _KEPT:
                del self._requests[next(iter(self._requests))]
            self._requests[shapes] = compiled.create_infer_request()
        return self._requests[shapes]


def _joins_integers(model: Any) -> bool:
    """Whether the network has concatenations of integers: OpenVINO 2026.4 ends the process as it compiles some of them,
    such as a DenseNet's placed for XNNPACK."""
    joined = (operator.input_values() for operator in model.get_ops() if operator.get_type_name() == "Concat")
    # An ONNX file's DequantizeLinear is a product here.
    return any(all(value.get_node().get_type_name() == "Multiply" for value in values) for values in joined)


def _check_in_child(path: Path, shapes: tuple[torch.Size, ...]) -> None:
    """Raise RuntimeError where compiling ends the process by a signal, found out in a process that may end."""
    if not sys.executable:
        return
    command = [sys.executable, "-c", _COMPILE, str(path), json.dumps([list(shape) for shape in shapes])]
    code = subprocess.run(command, capture_output=True, check=False).returncode
    if code < 0:
        raise RuntimeError(
            f"OpenVINO's compiler crashes on this network (signal {-code}), which was placed for another engine's "
            f"kernels. Run the file on ONNX Runtime, or prepare the network for target='x86'"
        )


def _sizes(shape: Any) -> list[int | None]:
    return [None if axis.is_dynamic else axis.get_length() for axis in shape]


def _properties(model: Any) -> dict[str, str]:
    """The ONNX file's metadata properties, which OpenVINO keeps under ``framework``."""
    if not model.has_rt_info(["framework"]):
        return {}
    return {str(key): str(value) for key, value in model.get_rt_info(["framework"]).value.items()}
