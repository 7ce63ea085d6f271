"""Running an ONNX file with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.engines.base import InferenceModel, import_optional
from lq.formats.onnx.read import metadata_of, unreadable


def import_onnxruntime() -> Any:
    """The package.

    Raises:
        MissingRuntimeError: where it is not installed.
    """
    return import_optional("onnxruntime", "ONNX Runtime", "onnx")


class OnnxRuntimeModel(InferenceModel):
    """A network in an ONNX file on ONNX Runtime's CPU provider."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors reach Python as exceptions
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise unreadable(path, "ONNX Runtime", error) from error
        inputs = [(value.name, value.type, value.shape) for value in self._session.get_inputs()]
        metadata = metadata_of(path, dict(self._session.get_modelmeta().custom_metadata_map), inputs)
        self._names = [name for name, _, _ in inputs]
        super().__init__(metadata, threads)

    def _run(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        arrays = {name: value.numpy(force=True) for name, value in zip(self._names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in self._session.run(None, arrays)]
